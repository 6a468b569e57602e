"""Mamba®: Vim with registers (Wang et al., CVPR 2025, arXiv 2405.14858).

Registers are learned tokens that are spread over the sequence. They hold the global
information that Vim stores in patches of the background. The names of parameters are
those of the published code.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mmvssm.backbones.base import fit_grid, with_pretrained
from mmvssm.backbones.isotropic import (
    ARCH_DEFAULTS,
    IsotropicMamba,
    block_depth,
    can_fit,
    check_choice,
    check_depth,
    component,
    describe,
    rename,
    resolve_arch,
    second_last_mixer,
)
from mmvssm.families import Family, register_family
from mmvssm.heads import RegisterHead
from mmvssm.layers import resize_position, token_positions
from mmvssm.registry import MODELS

ARCH_ZOO = {
    't': dict(ARCH_DEFAULTS, embed_dims=192, depth=24, registers=12),
    's': dict(ARCH_DEFAULTS, embed_dims=384, depth=24, registers=12),
    'b': dict(ARCH_DEFAULTS, embed_dims=768, depth=24, registers=12),
    'l': dict(ARCH_DEFAULTS, embed_dims=1024, depth=48, registers=16),
}


@MODELS.register_module()
class MambaR(IsotropicMamba):
    """Mamba® backbone.

    Arguments that are not listed here are those of :class:`Vim`. There are always
    position embeddings and never rotations, and the two directions are averaged.

    Args:
        arch: A name of ``ARCH_ZOO``: ``t``, ``s``, ``b``, ``l``. Or a dict as
            :class:`Vim` takes it, with one more key, ``registers`` (12).
        registers: Number n of registers, None for that of the arch. With 0 the
            parameters are those of a Vim without class token, and its checkpoints are
            recognised as Vim's.
        placement: ``'even'``, as published: one register after every M // (n + 1) of
            the M patches. ``'head'``: all before the patches. ``'middle'``: all
            together after half of the patches.
        frozen_stages: As in :class:`Vim`; 0 freezes the registers, too.
        return_tokens: Return pairs of a map and the registers (B, n, C). Maps never
            contain registers.

    Attributes:
        out_channels: Channels of each returned map.
        grid: Rows and columns for which the position embedding is stored.

    Raises:
        ValueError: An argument is out of range, or the image is smaller than a
            patch or has another number of channels.
    """

    def __init__(
        self,
        arch: str | dict = 't',
        *,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        registers: int | None = None,
        placement: str = 'even',
        residual_in_fp32: bool = True,
        feature: str = 'hidden',
        last_layer_process: str = 'none',
        return_tokens: bool = False,
        classification: bool = False,
        out_type: str | None = None,
        init_cfg: dict | list[dict] | None = None,
        pretrained: str | None = None,
        mask_padding: bool = False,
    ):
        arch = resolve_arch(arch, ARCH_ZOO, 'MambaR')
        check_choice('placement', placement, ('even', 'head', 'middle'))
        registers = arch['registers'] if registers is None else registers
        if registers < 0:
            raise ValueError(f'registers must not be negative, got {registers}')
        super().__init__(
            arch,
            img_size=img_size,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_path_rate=drop_path_rate,
            average=True,
            residual_in_fp32=residual_in_fp32,
            feature=feature,
            last_layer_process=last_layer_process,
            return_tokens=return_tokens,
            classification=classification,
            out_type=out_type,
            init_cfg=with_pretrained(init_cfg, pretrained),
            mask_padding=mask_padding,
        )
        self.num_registers = registers
        self.placement = placement
        channels = arch['embed_dims']
        shapes = {}
        if registers:
            shapes['cls_token'] = (1, registers, channels)
            shapes['pos_embed_cls'] = (1, registers, channels)
        shapes['pos_embed'] = (1, self.grid[0] * self.grid[1], channels)
        self._make_tokens(**shapes)
        self._freeze()

    def token_positions(self, patches: int) -> tuple[int, ...]:
        """Indices of the registers in a sequence with that many patches."""
        return token_positions(patches, self.num_registers, self.placement)

    def embed(
        self, patches: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add position embeddings to the patches, and to the registers their own."""
        patches = patches + resize_position(self.pos_embed, self.grid, size)
        if not self.num_registers:
            return patches, None
        return patches, self.cls_token + self.pos_embed_cls


# Factor by which the published head of each arch reduces a register.
_REDUCTION = dict(t=1, s=2, b=4, l=8)


def _head(
    backbone: MambaR, arch: str, num_classes: int, **options: Any
) -> RegisterHead:
    registers = backbone.num_registers
    defaults = dict(
        reduce=_REDUCTION[arch], pooling='concat' if registers else 'patches'
    )
    return RegisterHead(
        backbone.out_channels[-1], num_classes, registers, **{**defaults, **options}
    )


def _component(key: str) -> str | None:
    """As for Vim. Registers are part of the stem: every model has them."""
    if key in ('cls_token', 'pos_embed_cls'):
        return 'patch_embed.'
    return component(key)


def _fit(
    state: Mapping[str, torch.Tensor],
    backbone: MambaR,
    grids: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Resize the position embedding of a file to the model's grid.

    It has no vectors for registers. Vim's has vectors for class tokens.
    """
    check_depth(state, backbone)
    state = dict(state)
    if not can_fit(state, backbone):
        return state, []
    state['pos_embed'], notes = fit_grid(
        state['pos_embed'], backbone.grid, grids.get('')
    )
    return state, notes


FAMILY = register_family(
    Family(
        name='mambar',
        title='Mamba-R',
        backbone=MambaR,
        archs=ARCH_ZOO,
        head=_head,
        classifier_args=dict(classification=True),
        signature='pos_embed_cls',
        depth=block_depth,
        describe=partial(describe, archs=ARCH_ZOO, name='mambar', title='Mamba-R'),
        component=_component,
        target_layer=second_last_mixer,
        rename=rename,
        fit=_fit,
    )
)
