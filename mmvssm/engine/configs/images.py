"""What the parts of a config say of images, before anything is built."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from mmengine.config import Config

from mmvssm.engine.errors import UsageError

# Of mmseg and mmdet; they take means of 1 or 3 channels.
_PREPROCESSORS = {
    'SegDataPreProcessor': 'mmvssm.SegDataPreProcessor',
    'DetDataPreprocessor': 'mmvssm.DetDataPreprocessor',
}
# They change colours by hue, and drop a fourth channel without a word.
_THREE_CHANNELS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug')
_PYRAMIDS = ('Feature2Pyramid', 'mmseg.Feature2Pyramid')


def check_channels(cfg: Config, path: str) -> None:
    """Refuse a config whose parts are for different numbers of image channels.

    Args:
        cfg: The config.
        path: What messages call it.

    Raises:
        UsageError: ``in_channels`` and ``mean`` contradict each other, or the data
            preprocessor or a transform takes no such number.
    """
    model = cfg.get('model') or {}
    if model and image_channels(cfg) != 3:
        parts = _parts(cfg.get('train_dataloader'))
        types = [str(part.get('type')).rpartition('.')[2] for part in parts]
        for name in _THREE_CHANNELS:
            if name in types:
                raise UsageError(
                    f'{path}: {name} takes images of 3 channels, and those of this '
                    f'config have {image_channels(cfg)}: leave it out of the pipeline.'
                )
    mean = _mean(model)
    if mean is None:
        return
    kind = str(model.data_preprocessor.get('type')).rpartition('.')
    if kind[0] != 'mmvssm' and kind[2] in _PREPROCESSORS and len(mean) not in (1, 3):
        raise UsageError(
            f'{path}: {kind[2]} takes images of 1 or 3 channels, and mean of '
            f'data_preprocessor has {len(mean)} numbers: set type='
            f'{_PREPROCESSORS[kind[2]]!r}, which takes any number.'
        )
    channels = _in_channels(model)
    if channels is not None and len(mean) not in (1, channels):
        raise UsageError(
            f'{path}: in_channels of the backbone is {channels}, and mean of '
            f'data_preprocessor has {len(mean)} numbers: both are the number of '
            f'channels of the images.'
        )


def check_readers(cfg: Config, path: str) -> None:
    """Refuse a pipeline that reads with a package that is not installed.

    Raises:
        UsageError: It reads with tifffile, and there is none.
    """
    loaders = [cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test')]
    readers = {part.get('imdecode_backend') for part in _parts(loaders)}
    if 'tifffile' in readers and find_spec('tifffile') is None:
        raise UsageError(
            f'{path} reads images with tifffile, which is not installed: run `pip '
            'install tifffile`.'
        )


def image_channels(cfg: Config) -> int:
    """Number of channels of the images that a config's model takes."""
    channels, mean = _in_channels(cfg.model), _mean(cfg.model) or ()
    return channels or (len(mean) if len(mean) > 1 else 3)


def explain_small_images(cfg: Config) -> None:
    """Put ``mmvssm.Feature2Pyramid`` in the place of mmseg's.

    Args:
        cfg: Changed in place.
    """
    necks = (cfg.get('model') or {}).get('neck') or []
    for neck in necks if isinstance(necks, (list, tuple)) else [necks]:
        if isinstance(neck, dict) and neck.get('type') in _PYRAMIDS:
            neck['type'] = 'mmvssm.Feature2Pyramid'


def _parts(part: Any) -> Iterator[dict]:
    """All dicts in a part of a config."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            yield from _parts(value)


def _mean(model: dict) -> list | None:
    settings = model.get('data_preprocessor')
    mean = settings.get('mean') if isinstance(settings, dict) else None
    return list(mean) if isinstance(mean, (list, tuple)) and mean else None


def _in_channels(model: dict) -> int | None:
    """Those of the backbone; None if the config does not tell."""
    backbone: Any = model.get('backbone') or {}
    own = str(backbone.get('type')).startswith('mmvssm.')
    channels = backbone.get('in_channels', 3 if own else None)
    return channels if isinstance(channels, int) else None
