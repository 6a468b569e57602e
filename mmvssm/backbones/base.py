"""What the backbones of all families have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor

from mmvssm.backbones.padding import masked_maps
from mmvssm.errors import CheckpointError
from mmvssm.layers import resize_position

# Loads a checkpoint into a module, and gives a report. mmvssm.checkpoints, which
# imports this file, puts its function here.
_load_pretrained: Callable[..., Any] | None = None


def set_pretrained_loader(load: Callable[..., Any]) -> None:
    """Say by what ``init_cfg=dict(type='Pretrained', ...)`` is carried out.

    Args:
        load: Takes the module, the ``checkpoint`` and ``prefix=``; gives a report to
            print.
    """
    global _load_pretrained
    _load_pretrained = load


class Backbone(BaseModule):
    """An mmengine module that loads published checkpoints as they are.

    A subclass computes maps in :meth:`compute_maps`, and tells their sizes by
    :meth:`whole_size` and :meth:`map_sizes`.

    Args:
        init_cfg, mask_padding: See :class:`VSSM`.
    """

    def __init__(
        self, init_cfg: dict | list[dict] | None = None, mask_padding: bool = False
    ):
        super().__init__(init_cfg)
        self.mask_padding = mask_padding

    def forward(
        self, x: Tensor, img_shapes: Sequence[Sequence[int]] | None = None
    ) -> tuple:
        """Compute the maps of ``out_indices``.

        Args:
            x: Images (B, in_channels, H, W).
            img_shapes: With ``mask_padding``, height and width of each image in
                pixels; what is below and to the right is padding. None: those that
                the data preprocessor ``mmvssm.DetDataPreprocessor``, or
                :func:`set_img_shapes`, has given the batch.

        Returns:
            What :meth:`compute_maps` returns. With ``mask_padding`` maps are zero
            beyond the image, and patches that an image or the batch does not fill
            are filled up with zeros rather than left out.

        Raises:
            ValueError: ``img_shapes`` does not fit, is missing, or is given without
                ``mask_padding``.
            RuntimeError: Masked images in a backbone that is sharded or has
                synchronised batch norms in training.
        """
        if self.mask_padding and x.ndim == 4:
            return masked_maps(self, x, img_shapes)
        if img_shapes is not None and not self.mask_padding:
            raise ValueError(
                'img_shapes have no effect without mask_padding: build the backbone '
                'with mask_padding=True, or leave them out'
            )
        return self.compute_maps(x)

    def compute_maps(self, x: Tensor) -> tuple:
        """Compute the maps of images that fill the batch."""
        raise NotImplementedError

    def whole_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The least image size of whole patches in which another one has room."""
        raise NotImplementedError

    def map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each map, of an image of whole patches."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Apply ``init_cfg``.

        ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` goes through
        :func:`mmvssm.load_checkpoint`: the file is recognised and converted,
        what matched is logged, and a file that does not fit is an error
        (mmengine's own loader would go on without the weights). Without an
        ``init_cfg`` the published initialisation stays, which is in place
        after construction.
        """
        given = self.init_cfg
        cfgs = [given] if isinstance(given, dict) else list(given or [])
        pretrained = [
            cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)
        ]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        super().init_weights()
        self.init_cfg = given
        for cfg in pretrained:
            report = _load_pretrained(self, cfg['checkpoint'], prefix=cfg.get('prefix'))
            print_log(str(report), logger='current')


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


def fit_grid(
    embedding: Tensor, grid: tuple[int, int], name: str = 'pos_embed'
) -> tuple[Tensor, list[str]]:
    """Resize the position embedding of a file to the model's grid.

    A grid that has not the model's number of patches is taken to be square.

    Args:
        embedding: (1, M, C), of the patches alone.
        grid: Rows and columns of the model.
        name: What to call it in messages.

    Returns:
        The embedding, and a note if it was resized.

    Raises:
        CheckpointError: The number of patches is no square.
    """
    length = embedding.shape[1]
    if length == grid[0] * grid[1]:
        return embedding, []
    side = math.isqrt(length)
    if side * side != length:
        raise CheckpointError(
            f'the position embedding of the file belongs to {length} patches, which '
            f'are no square grid, and the model has {grid[0]}x{grid[1]}; build the '
            f'model with the img_size of the file'
        )
    note = f'{name} was resized from {side}x{side} to {grid[0]}x{grid[1]}'
    return resize_position(embedding, (side, side), grid), [note]
