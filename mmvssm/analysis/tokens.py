"""What a backbone holds after each of its blocks: patches, and extra tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeAlias, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmvssm.backbones.base import Backbone
from mmvssm.backbones.hierarchical import HierarchicalBackbone
from mmvssm.backbones.isotropic import IsotropicMamba
from mmvssm.layers import split_tokens

T = TypeVar('T')
# From what a block returns to patches (B, C, h, w) and extra tokens (B, n, C).
_Reader: TypeAlias = Callable[[object], tuple[Tensor, Tensor]]


class Layer(NamedTuple):
    """The output of a block.

    Attributes:
        name: Number of the block from 0; in a hierarchical backbone stage and block,
            such as ``'2.7'``.
        patches: The local tokens as a map (B, C, h, w).
        tokens: Class tokens or registers (B, n, C); n is 0 where there are none.
    """

    name: str
    patches: Tensor
    tokens: Tensor


def layer_outputs(
    backbone: nn.Module,
    images: Tensor,
    each: Callable[[Layer], T] = lambda layer: layer,
) -> list[T]:
    """Run a backbone, and collect the output of every block.

    The output includes the residual stream. In Vim and Mamba® a block leaves its own
    part and the stream apart; here they are added up.

    Args:
        backbone: One of this package, or a vision transformer of timm.
        images: (B, in_channels, H, W), normalised.
        each: Called with every :class:`Layer`. What it returns is kept in the place of
            the layer, which saves memory if it is smaller.

    Returns:
        One item for each block, from the image to the last map.

    Raises:
        ValueError: The backbone has no blocks that are known here.
    """
    found = []
    with watch_blocks(backbone, images.shape[2:], lambda x: found.append(each(x))):
        compute_maps(backbone, images)
    return found


@contextmanager
def watch_blocks(
    backbone: nn.Module, size: Sequence[int], see: Callable[[Layer], object]
) -> Iterator[None]:
    """Call a function with the output of every block that runs meanwhile.

    Args:
        backbone: See :func:`layer_outputs`.
        size: Height and width of the images.
        see: The function.

    Raises:
        ValueError: See :func:`layer_outputs`.
    """

    def hook_of(name: str, read: _Reader) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            see(Layer(name, *read(output)))

        return hook

    with ExitStack() as stack:
        for name, block, read in _blocks(backbone, tuple(size)):
            handle = block.register_forward_hook(hook_of(name, read))
            stack.callback(handle.remove)
        yield


def compute_maps(backbone: nn.Module, images: Tensor) -> list[Layer]:
    """What a backbone returns, with patches and extra tokens apart.

    Args:
        backbone, images: See :func:`layer_outputs`. Masks of padding do not apply.

    Returns:
        The maps from the first to the last, with their numbers as names. There are
        maps and extra tokens whatever ``out_type`` and ``return_tokens`` of the
        backbone say. A vision transformer of timm has one map, after its last norm.
    """
    if isinstance(backbone, IsotropicMamba):
        given = backbone.return_tokens, backbone.out_type
        backbone.return_tokens, backbone.out_type = True, None
        try:
            outs = backbone.compute_maps(images)
        finally:
            backbone.return_tokens, backbone.out_type = given
    elif isinstance(backbone, Backbone):
        outs = backbone.compute_maps(images)
    elif _is_transformer(backbone):
        out = backbone.forward_features(images)
        outs = [_split_transformer(backbone, tuple(images.shape[2:]))(out)]
    else:
        outs = backbone(images)
    pairs = [out if isinstance(out, tuple) else (out, _no_tokens(out)) for out in outs]
    return [Layer(str(i), *pair) for i, pair in enumerate(pairs)]


def tokens_inside(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Which local tokens lie on an object.

    Args:
        mask: Whether a pixel belongs to an object, bool (H, W).
        grid: Rows and columns h, w of the map.

    Returns:
        bool (h, w): whether the mask covers at least half of the token's part of the
        image, that is of one of h x w equal parts.
    """
    share = F.adaptive_avg_pool2d(mask[None, None].double(), tuple(grid))
    return share[0, 0] >= 0.5


def _no_tokens(patches: Tensor) -> Tensor:
    return patches.new_zeros(patches.shape[0], 0, patches.shape[1])


def _blocks(
    backbone: nn.Module, size: tuple[int, ...]
) -> Iterator[tuple[str, nn.Module, _Reader]]:
    """Name and module of each block, and what reads its output."""
    if isinstance(backbone, HierarchicalBackbone):
        for i, stage in enumerate(backbone.layers):
            for j, block in enumerate(stage.blocks):
                yield f'{i}.{j}', block, lambda out: (out, _no_tokens(out))
    elif isinstance(backbone, IsotropicMamba):
        read = _split_mamba(backbone, size)
        for i, block in enumerate(backbone.layers):
            yield str(i), block, read
    elif _is_transformer(backbone):
        read = _split_transformer(backbone, size)
        for i, block in enumerate(backbone.blocks):
            yield str(i), block, read
    else:
        raise ValueError(
            f'the blocks of {type(backbone).__name__} are not known: give a backbone '
            'of this package or a vision transformer of timm'
        )


def _split_mamba(backbone: IsotropicMamba, size: tuple[int, ...]) -> _Reader:
    grid = tuple((side - backbone.patch_size) // backbone.stride + 1 for side in size)
    positions = backbone.token_positions(grid[0] * grid[1])

    def read(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        patches, tokens = split_tokens(output[0] + output[1], positions)
        return patches.mT.unflatten(2, grid), tokens

    return read


def _is_transformer(backbone: nn.Module) -> bool:
    parts = ('blocks', 'num_prefix_tokens', 'patch_embed', 'forward_features')
    return all(hasattr(backbone, part) for part in parts)


def _split_transformer(backbone: nn.Module, size: tuple[int, ...]) -> _Reader:
    grid = backbone.patch_embed.dynamic_feat_size(size)
    extra = backbone.num_prefix_tokens

    def read(output: Tensor) -> tuple[Tensor, Tensor]:
        return output[:, extra:].mT.unflatten(2, grid), output[:, :extra]

    return read
