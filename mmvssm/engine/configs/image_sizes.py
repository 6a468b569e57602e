"""Which sizes of images a config's pipelines make, found without an image.

Images of several shapes are sent through the arithmetic of the transforms that change
sizes: resizing, cropping, padding. Transforms it does not know leave a size as it is.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from mmengine.config import Config

# Height and width of photographs, upright and not.
_ORIGINALS = [
    *((480, 640), (640, 480), (640, 640), (427, 640), (640, 427)),
    *((1024, 2048), (2048, 1024), (360, 1200), (1200, 360)),
]
# Factors between the ends of a range that are tried.
_STEPS = 5

Size = tuple[int, int]


class Batch(NamedTuple):
    """Sizes of a batch of images."""

    number: int
    height: int
    width: int


def training_batches(cfg: Config) -> list[Batch]:
    """Batches of a training, the largest one first."""
    loader = cfg.train_dataloader
    number = int(loader.get('batch_size') or 1)
    return _batches(cfg, number, _after(_pipeline(loader), _ORIGINALS), 'train')


def inference_batches(cfg: Config) -> list[Batch]:
    """Batches of validation and test; none without a ``val_dataloader``."""
    found: dict[Batch, None] = {}
    for name in ('val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader:
            number = int(loader.get('batch_size') or 1)
            sizes = _after(_pipeline(loader), _ORIGINALS)
            found |= dict.fromkeys(_batches(cfg, number, sizes, 'test'))
    return list(found)


def _pipeline(loader: dict) -> list[dict]:
    """The transforms of a loader's data set, those of data sets around it behind."""
    dataset, found = loader.get('dataset') or {}, []
    while dataset:
        found = [*(dataset.get('pipeline') or []), *found]
        inner = dataset.get('dataset') or dataset.get('datasets')
        dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
    return found


def _batches(cfg: Config, number: int, sizes: Iterable[Size], mode: str) -> list[Batch]:
    """Batches of images of some of these sizes, as the model's preprocessor pads them.

    A batch is as high as its highest image and as wide as its widest.
    """
    sizes = list(sizes)
    if number > 1:
        heights, widths = (_some({size[axis] for size in sizes}) for axis in (0, 1))
        sizes = [(height, width) for height in heights for width in widths]
    padded = {_padded(cfg.model, size, mode) for size in sizes}
    largest_first = sorted(padded, key=lambda size: -size[0] * size[1])
    whole = [Batch(number, *size) for size in largest_first]
    # The last batch of an epoch may be of a single image.
    single = [Batch(1, *size) for size in (largest_first[0], largest_first[-1])]
    return list(dict.fromkeys([*whole, *single]))


def _some(values: set[int], most: int = _STEPS) -> list[int]:
    """At most so many of them, with the smallest and the largest."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


def _padded(model: dict, size: Size, mode: str) -> Size:
    """The size that the model sees."""
    test = model.get('test_cfg') or {}
    if mode == 'test' and test.get('mode') == 'slide':
        size = _min(size, _pair(test['crop_size']))
    settings = model.get('data_preprocessor') or {}
    if mode == 'test' and 'pad_size_divisor' not in settings:
        # mmseg pads otherwise when it tests.
        settings = settings.get('test_cfg') or {}
    return _pad(size, settings.get('size'), settings)


def _pad(size: Size, to: Any, settings: dict) -> Size:
    if to:
        size = _max(size, _pair(to))
    divisor = settings.get('pad_size_divisor') or settings.get('size_divisor') or 1
    return tuple(-(-side // divisor) * divisor for side in size)


def _after(transforms: Iterable[dict], sizes: Iterable[Size]) -> set[Size]:
    """The sizes that images of some sizes may have after transforms."""
    found = set(sizes)
    for transform in transforms:
        kind = str(transform.get('type')).rpartition('.')[2]
        change = _CHANGES.get(kind)
        if change:
            found = {after for size in found for after in change(transform, size)}
    return found


def _resize(transform: dict, size: Size) -> list[Size]:
    if transform.get('scale') is None:
        factors = _pair(transform.get('scale_factor') or 1.0)
        # Given by width and height.
        return [(round(size[0] * factors[1]), round(size[1] * factors[0]))]
    return [_fit(size, _pair(transform['scale']), transform.get('keep_ratio'))]


def _random_resize(transform: dict, size: Size) -> list[Size]:
    scale, ratios = transform['scale'], transform.get('ratio_range')
    keep = transform.get('keep_ratio', True)
    if isinstance(scale, (list, tuple)) and isinstance(scale[0], (list, tuple)):
        ends = scale
    else:
        low, high = ratios or (1.0, 1.0)
        ends = [[round(side * r) for side in _pair(scale)] for r in (low, high)]
    between = [
        tuple(round(a + (b - a) * i / (_STEPS - 1)) for a, b in zip(*ends))
        for i in range(_STEPS)
    ]
    return [_fit(size, scale, keep) for scale in between]


def _choice_resize(transform: dict, size: Size) -> list[Size]:
    keep = transform.get('keep_ratio')
    return [_fit(size, _pair(scale), keep) for scale in transform['scales']]


def _fit(size: Size, scale: Size, keep_ratio: bool | None) -> Size:
    """Resized to width and height, or into these, whichever way round."""
    if not keep_ratio:
        return scale[1], scale[0]
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(max(1, round(side * factor)) for side in size)


def _crop(transform: dict, size: Size) -> list[Size]:
    crop, kind = _pair(transform['crop_size']), transform.get('crop_type', 'absolute')
    if kind == 'absolute':
        return [_min(size, crop)]
    if kind == 'absolute_range':
        low, high = (_min(size, (side, side)) for side in crop)
    else:
        low = tuple(round(side * part) for side, part in zip(size, crop))
        high = size if kind == 'relative_range' else low
    corners = [low, high, (low[0], high[1]), (high[0], low[1])]
    return [_max(corner, (1, 1)) for corner in corners]


def _to_scale(transform: dict, size: Size) -> list[Size]:
    """Of a random part of the image; ``scale`` is height and width."""
    scale = _pair(transform['scale'])
    return [(int(scale[0]), int(scale[1]))]


def _resize_edge(transform: dict, size: Size) -> list[Size]:
    """One edge gets this length, the other one follows."""
    (height, width), side = size, transform['scale']
    edge = transform.get('edge', 'short')
    if edge in ('short', 'long'):
        is_wide = width < height if edge == 'short' else width > height
        edge = 'width' if is_wide else 'height'
    if edge == 'width':
        return [(int(side * height / width), side)]
    return [(side, int(side * width / height))]


def _choose(transform: dict, size: Size) -> list[Size]:
    branches = transform['transforms']
    return [x for branch in branches for x in _after(_list(branch), [size])]


def _augment(transform: dict, size: Size) -> list[Size]:
    """Alternatives of each kind, one kind after the other."""
    found = {size}
    for alternatives in transform['transforms']:
        found = {
            x for y in found for one in alternatives for x in _after([one], [y])
        } or found
    return list(found)


_CHANGES = dict(
    Resize=_resize,
    RandomResize=_random_resize,
    RandomChoiceResize=_choice_resize,
    RandomCrop=_crop,
    CenterCrop=_crop,
    RandomResizedCrop=_to_scale,
    ResizeEdge=_resize_edge,
    Pad=lambda transform, size: [_pad(size, transform.get('size'), transform)],
    RandomChoice=_choose,
    RandomApply=lambda transform, size: [
        size,
        *_after(_list(transform['transforms']), [size]),
    ],
    TestTimeAug=_augment,
)


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pair(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _min(a: Size, b: Size) -> Size:
    return min(a[0], b[0]), min(a[1], b[1])


def _max(a: Size, b: Size) -> Size:
    return max(a[0], b[0]), max(a[1], b[1])
