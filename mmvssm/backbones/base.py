"""What the backbones of all families have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn

from mmvssm.errors import CheckpointError
from mmvssm.layers import resize_position

# Loads a checkpoint into a module, and gives a report. mmvssm.checkpoints, which
# imports this file, puts its function here.
_load_pretrained: Callable[..., Any] | None = None


def set_pretrained_loader(load: Callable[..., Any]) -> None:
    """Say by what ``init_cfg=dict(type='Pretrained', ...)`` is carried out.

    Args:
        load: Takes the module, the ``checkpoint``, ``prefix=`` and ``weights=``; gives
            a report to print.
    """
    global _load_pretrained
    _load_pretrained = load


class Backbone(BaseModule):
    """An mmengine module that loads published checkpoints as they are."""

    def init_weights(self) -> None:
        """Apply ``init_cfg``.

        ``dict(type='Pretrained', checkpoint=PATH_OR_NAME)``, with ``prefix`` and
        ``weights`` as further keys, goes through
        :func:`mmvssm.load_checkpoint`: the file is recognised and converted,
        what matched is logged, and a file that does not fit is an error
        (mmengine's own loader would go on without the weights). Without an
        ``init_cfg`` the published initialisation stays, which is in place
        after construction.
        """
        given = self.init_cfg
        cfgs = [given] if given and isinstance(given, dict) else list(given or [])
        pretrained = [
            cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)
        ]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = given
        for cfg in pretrained:
            options = {key: cfg[key] for key in ('prefix', 'weights') if key in cfg}
            report = _load_pretrained(self, cfg['checkpoint'], **options)
            print_log(str(report), logger='current')


def with_pretrained(
    init_cfg: dict | list[dict] | None, pretrained: str | None
) -> dict | list[dict] | None:
    """Add what ``pretrained=`` names, as mmseg 0.x has it, to an ``init_cfg``.

    Raises:
        ValueError: That one names weights, too.
    """
    if pretrained is None:
        return init_cfg
    given = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
    if any(cfg['type'] in ('Pretrained', PretrainedInit) for cfg in given):
        raise ValueError(
            f'pretrained={pretrained!r} and init_cfg both name weights: leave one out'
        )
    return [*given, dict(type='Pretrained', checkpoint=pretrained)]


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is an integer of at least that value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_in_channels(in_channels: int) -> None:
    """Raise ValueError unless it is a number of channels."""
    if not is_count(in_channels):
        raise ValueError(
            f'in_channels must be the number of channels of the image, 1 or more, got '
            f'{in_channels!r}'
        )


def parse_img_size(img_size: int | Sequence[int], smallest: int = 1) -> tuple[int, int]:
    """One number or height and width -> height and width.

    Args:
        img_size: In pixels.
        smallest: Least height and width.

    Raises:
        ValueError: It is neither, or too small.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(is_count(side, smallest) for side in sides)
    ):
        raise ValueError(
            f'img_size must be one number of pixels or (height, width), each at least '
            f'{smallest}, got {img_size!r}'
        )
    return tuple(sides)


def describe_arch(
    found: Mapping[str, Any], archs: Mapping[str, Mapping], name: str, title: str
) -> str:
    """Name of the model whose arch has the values found, or the values in words.

    Args:
        found: Values of some keys of an arch.
        archs: Archs by name.
        name: First part of the names of the family's models.
        title: What messages call the family.
    """
    for arch_name, arch in archs.items():
        if all(arch[key] == value for key, value in found.items()):
            return f'{name}_{arch_name}'
    return f'a {title} with ' + ', '.join(f'{k}={v}' for k, v in found.items())


def note_grid(module: nn.Module) -> None:
    """Have state dicts say which grid the position embedding of a module is for.

    It goes into their metadata, as torch's version numbers do, from ``module.grid``:
    no name is added, and ``torch.save`` writes it along.
    """

    def note(
        module: nn.Module, state: dict, prefix: str, metadata: dict[str, Any]
    ) -> None:
        metadata['grid'] = tuple(module.grid)

    module.register_state_dict_post_hook(note)


def fit_grid(
    embedding: Tensor,
    grid: tuple[int, int],
    stored: tuple[int, int] | None,
    name: str = 'pos_embed',
) -> tuple[Tensor, list[str]]:
    """Resize the position embedding of a file to the model's grid.

    Where the file does not say its grid, a square one is assumed, as all published
    files have, and else the model's.

    Args:
        embedding: (1, M, C), of the patches alone.
        grid: Rows and columns of the model.
        stored: Rows and columns of the file, if it says so.
        name: What to call it in messages.

    Returns:
        The embedding, and a note if it was resized or its grid is a guess.

    Raises:
        CheckpointError: It belongs to no grid that could be told.
    """
    length = embedding.shape[1]
    side = math.isqrt(length)
    if stored is not None and stored[0] * stored[1] == length:
        old = tuple(stored)
    elif side * side == length:
        old = side, side
    elif length == grid[0] * grid[1]:
        return embedding, [
            f"{name} was taken to be for the model's grid of {grid[0]}x{grid[1]}: the "
            'file does not say'
        ]
    else:
        raise CheckpointError(
            f'the position embedding of the file belongs to {length} patches, which '
            f'are no square grid, and the model has {grid[0]}x{grid[1]}; build the '
            f'model with the img_size of the file'
        )
    if old == grid:
        return embedding, []
    note = f'{name} was resized from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}'
    return resize_position(embedding, old, grid), [note]
