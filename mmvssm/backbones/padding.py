"""Maps of images of several sizes that were padded to one batch.

A scan over the whole map and an attention over all positions read the padding, so the
maps of an image depend on how large its neighbours are. Here the images of each size
are cut out of the batch and run on their own: positions that are not there enter no
state, take no part in an attention, and move no class token, register or position
embedding.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]

# Where a batch keeps the sizes of its images. It goes with the tensor: a copy has
# none, and no batch ever has those of another one.
_ATTRIBUTE = '_mmvssm_img_shapes'
# Wrappers and layers in which processes wait for each other in a forward pass.
_SHARDED = ('FullyShardedDataParallel', 'FSDPModule')
_SYNCHRONISED = 'SyncBatchNorm'


class Maskable(Protocol):
    """What :func:`masked_maps` asks of a backbone."""

    def compute_maps(self, x: Tensor) -> tuple:
        """Maps of images of one size, or pairs of a map and tokens (B, n, C)."""

    def whole_size(self, size: Size) -> Size:
        """The least image size of whole patches in which another one has room."""

    def map_sizes(self, size: Size) -> list[Size]:
        """Height and width of each map of such a size."""

    def modules(self) -> Iterable[nn.Module]:
        """The parts of it, as every module has."""


def set_img_shapes(batch: Tensor, img_shapes: Sequence[Sequence[int]]) -> None:
    """Tell backbones with ``mask_padding`` which part of a batch is image.

    For models that call their backbone with the batch alone. The sizes belong to
    this very tensor: a copy, a slice or a cast of it has none.

    Args:
        batch: (B, C, H, W). Images are at the top left.
        img_shapes: Height and width of each of the B images in pixels.
    """
    setattr(batch, _ATTRIBUTE, [tuple(shape[:2]) for shape in img_shapes])


def find_img_shapes(
    batch: Tensor, img_shapes: Sequence[Sequence[int]] | None
) -> list[Size]:
    """Sizes of the images of a batch: those given, else those it was given before.

    Raises:
        ValueError: They are not known, or do not fit the batch.
    """
    if img_shapes is None:
        img_shapes = getattr(batch, _ATTRIBUTE, None)
    if img_shapes is None:
        raise ValueError(
            'mask_padding=True needs the size of each image, and this batch comes '
            'without. In a config of mmdet set model.data_preprocessor.type to '
            "'mmvssm.DetDataPreprocessor'. In plain PyTorch call backbone(x, "
            'img_shapes=[(height, width), ...]), or mmvssm.backbones.set_img_shapes(x, '
            '...) where another module calls it. Without padded images (mmseg, '
            'classifiers) leave mask_padding=False'
        )
    number, _, height, width = batch.shape
    sizes = [tuple(map(index, shape[:2])) for shape in img_shapes]
    if len(sizes) != number or any(
        len(size) != 2 or not (0 < size[0] <= height and 0 < size[1] <= width)
        for size in sizes
    ):
        raise ValueError(
            f'img_shapes must be the height and width of each of the {number} images, '
            f'1 to {height} and 1 to {width} pixels as the batch of shape '
            f'{tuple(batch.shape)} has room for, got {list(img_shapes)}'
        )
    return sizes


# A graph of this function would be one of these sizes alone. The passes it makes are
# compiled, for all sizes.
@torch.compiler.disable(recursive=False)
def masked_maps(
    backbone: Maskable, x: Tensor, img_shapes: Sequence[Sequence[int]] | None
) -> tuple:
    """The maps of each image alone, with zeros beyond it.

    Patches that an image does not fill are filled up with zeros.

    Args:
        backbone: Called once for each size.
        x: (B, C, H, W). Images are at the top left, and nothing else is read.
        img_shapes: See :func:`find_img_shapes`.

    Returns:
        What ``backbone.compute_maps`` returns, for the batch. Maps have the size of
        those of H x W, rounded up to whole patches.

    Raises:
        ValueError: Sizes are not known, or do not fit the batch.
        RuntimeError: Processes wait for each other inside of the backbone.
    """
    sizes = find_img_shapes(x, img_shapes)
    _refuse_waiting(backbone)
    groups: dict[Size, list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(size, []).append(number)
    targets = backbone.map_sizes(backbone.whole_size(tuple(x.shape[2:])))
    found, places = [], {}
    for (height, width), members in groups.items():
        for row, number in enumerate(members):
            places[number] = (len(found), row)
        whole = backbone.whole_size((height, width))
        images = torch.stack([x[number, :, :height, :width] for number in members])
        outs = backbone.compute_maps(_pad(images, whole))
        found.append(
            [
                _each(lambda t, own=own, target=target: _fill(t, own, target), out)
                for out, own, target in zip(
                    outs, backbone.map_sizes(whole), targets, strict=True
                )
            ]
        )
    if len(found) == 1:
        return tuple(found[0])
    order = [places[number] for number in range(len(sizes))]

    def join(*parts: Tensor) -> Tensor:
        return torch.stack([parts[group][row] for group, row in order])

    return tuple(_each(join, *outs) for outs in zip(*found, strict=True))


def _each(function: Callable[..., Tensor], *outs: Tensor | tuple) -> Tensor | tuple:
    """Call it with maps; of pairs with maps, and with tokens."""
    if isinstance(outs[0], tuple):
        return tuple(_each(function, *parts) for parts in zip(*outs, strict=True))
    return function(*outs)


def _fill(x: Tensor, own: Size, target: Size) -> Tensor:
    """A map of its own size -> of the batch's; tokens (B, n, C) stay as they are."""
    if x.ndim == 3:
        return x
    if tuple(x.shape[2:]) != own:
        raise RuntimeError(
            f'a map is {tuple(x.shape[2:])}, and by map_sizes of the backbone it would '
            f'be {own}: a family with another stem defines its own'
        )
    return _pad(x, target)


def _pad(x: Tensor, size: Size) -> Tensor:
    """Zeros at the bottom and right."""
    below, right = (want - have for want, have in zip(size, x.shape[2:]))
    return F.pad(x, (0, right, 0, below)) if below or right else x


def _refuse_waiting(backbone: Maskable) -> None:
    """Refuse layers that would wait for passes that other processes do not make."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    for module in backbone.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        sharded = module is not backbone and not names.isdisjoint(_SHARDED)
        if sharded or (_SYNCHRONISED in names and module.training):
            raise RuntimeError(
                f'mask_padding=True runs the images of each size on their own, so '
                f'processes make different numbers of passes, and '
                f'{type(module).__name__} waits for all of them in each. Train with '
                f'DDP and without sync_bn, or leave mask_padding=False'
            )
