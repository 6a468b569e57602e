"""Vim: Vision Mamba (Zhu et al., ICML 2024, arXiv 2401.09417).

An isotropic backbone: patches of 16 x 16 pixels, with or without a class token, go
through blocks that scan the sequence from both ends. The names of parameters are those
of the published code.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    has_pyramid,
    rename,
    resolve_arch,
    second_last_mixer,
)
from mmvssm.families import Family, register_family
from mmvssm.heads import ClassTokenHead
from mmvssm.layers import (
    insert_tokens,
    resize_position,
    split_tokens,
    token_positions,
)
from mmvssm.registry import MODELS

ARCH_ZOO = {
    't': dict(ARCH_DEFAULTS, embed_dims=192, depth=24),
    's': dict(ARCH_DEFAULTS, embed_dims=384, depth=24),
    'b': dict(ARCH_DEFAULTS, embed_dims=768, depth=24),
    # Fine-tuned with overlapping patches.
    't_stride8': dict(ARCH_DEFAULTS, embed_dims=192, depth=24, stride=8),
    's_stride8': dict(ARCH_DEFAULTS, embed_dims=384, depth=24, stride=8),
}
# Option cls_token -> parameters and placement of the class tokens.
_CLASS_TOKENS = {
    'none': ((), 'head'),
    'head': (('cls_token',), 'head'),
    'middle': (('cls_token',), 'middle'),
    'double': (('cls_token_head', 'cls_token_tail'), 'ends'),
}


@MODELS.register_module()
class Vim(IsotropicMamba):
    """Vim backbone.

    Args:
        arch: A name of ``ARCH_ZOO``: ``t``, ``s``, ``b``, ``t_stride8``,
            ``s_stride8``. Or a dict with ``embed_dims`` (int, channels) and
            ``depth`` (int, blocks) and, optionally, ``patch_size`` (16),
            ``stride`` (16), ``d_state`` (16, states of a channel), ``d_conv`` (4,
            width of the causal convolution), ``expand`` (2, channels inside a
            block relative to ``embed_dims``) and ``drop_path_rate`` (.1).
        img_size: Image size, one number or height and width. The position embedding is
            stored for its grid of patches. Images may have any size: the embedding is
            resized to their grid.
        in_channels: Channels of the image.
        out_indices: Blocks whose maps are returned; None for the last block of each
            quarter, ``(5, 11, 17, 23)`` of 24. Later blocks are not built, so every
            parameter gets a gradient.
        frozen_stages: -1 freezes nothing, 0 the patch embedding, positions and
            class token, i >= 1 also the first i blocks. Frozen parts get no
            gradient and stay in eval mode.
        with_cp: Recompute each block in the backward pass to save memory.
        drop_path_rate: Rate at the end of the stack, growing linearly from 0;
            None for the value of the arch.
        cls_token: Place of the class token: ``'none'``, ``'head'``, ``'middle'`` (as in
            all published classifiers) or ``'double'`` (one at each end). Maps do not
            contain it.
        pos_embed: Whether to add a position embedding to the patches.
        rope: Whether to rotate pairs of channels by the position of the patch. As
            published, this is done again before every block. Class tokens are not
            rotated.
        rope_residual: Rotate the residual stream, too.
        rope_grid: Rows and columns of the grid of pre-training, one number or two, to
            which positions are scaled for ``rope``.
        average: Average the two directions of a block; otherwise add them up.
        residual_in_fp32: Keep the residual stream in float32.
        feature: Content of the maps: ``'hidden'``, the output of the block, or
            ``'residual'``, the residual stream with that output (after the drop path
            and the rotation of the next block).
        last_layer_process: Content of the last map, for any ``feature``: ``'none'``,
            the output of the block; ``'add'``, its sum with the residual stream;
            ``'norm'``, that sum, normalised.
        return_tokens: Return pairs of a map and the class tokens (B, n, C).
        classification: Build the form of the published classifiers: only the map of the
            last block, normalised, with tokens, with drop path before that norm, and
            with their initialisation of the step sizes of the backward direction.
        out_type: What is returned for each of ``out_indices``, as in MMPretrain's
            ``VisionTransformer``: ``'featmap'``, the map alone; ``'cls_token'``, the
            mean (B, C) of the class tokens; ``'avg_featmap'``, that of the patches.
            None: the map, or the pair that ``return_tokens`` or ``classification``
            asks for.
        pretrained_cls_token: Place of the class token in a classification checkpoint,
            ``'middle'`` or ``'head'``; the file does not say. Only used if the model
            itself has no class token.
        init_cfg: mmengine's initialisation config. ``dict(type='Pretrained',
            checkpoint=...)`` loads published files without conversion, by
            :func:`mmvssm.load_checkpoint`, and logs what matched.
        pretrained: The older way to say so: the ``checkpoint`` alone.
        directions: The paper's table 4: ``'both'`` (as published), each block scans
            from both ends, each time after a convolution of its own; ``'shared_conv'``,
            the two scans of a block share a convolution; ``'alternate'``, every second
            block scans from the end, the others from the start; ``'forward'``, all scan
            from the start alone. Published files fit ``'both'``.
        flip_sequences: Probability with which training turns the sequences of a batch
            round before the blocks, and their outputs back again: the paper's
            "bidirectional sequence", for ``directions='forward'``.
        mask_padding: For batches of images of several sizes, padded at the bottom
            and right: compute the maps of each image as if it were alone, and set
            them to zero beyond it. The images of each size run on their own. It
            needs the sizes: see :meth:`forward` and docs/detection.md.

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
        cls_token: str = 'none',
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_grid: int | tuple[int, int] = 14,
        average: bool = True,
        residual_in_fp32: bool = True,
        feature: str = 'hidden',
        last_layer_process: str = 'none',
        return_tokens: bool = False,
        classification: bool = False,
        out_type: str | None = None,
        pretrained_cls_token: str = 'middle',
        init_cfg: dict | list[dict] | None = None,
        pretrained: str | None = None,
        mask_padding: bool = False,
        directions: str = 'both',
        flip_sequences: float = 0.0,
    ):
        arch = resolve_arch(arch, ARCH_ZOO, 'Vim')
        check_choice('cls_token', cls_token, _CLASS_TOKENS)
        check_choice('pretrained_cls_token', pretrained_cls_token, ('middle', 'head'))
        super().__init__(
            arch,
            img_size=img_size,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_path_rate=drop_path_rate,
            average=average,
            residual_in_fp32=residual_in_fp32,
            feature=feature,
            last_layer_process=last_layer_process,
            return_tokens=return_tokens,
            classification=classification,
            out_type=out_type,
            init_cfg=with_pretrained(init_cfg, pretrained),
            mask_padding=mask_padding,
            directions=directions,
            flip_sequences=flip_sequences,
        )
        channels = arch['embed_dims']
        if rope and channels % 4:
            raise ValueError(
                f'rope rotates pairs of channels by rows and columns: embed_dims '
                f'must be a multiple of 4, got {channels}'
            )
        self.cls_token_place = cls_token
        self.pretrained_cls_token = pretrained_cls_token
        if rope:
            both = isinstance(rope_grid, int)
            self.rope = (rope_grid, rope_grid) if both else tuple(rope_grid)
        self.rope_residual = rope_residual
        names, self._placement = _CLASS_TOKENS[cls_token]
        shapes = dict.fromkeys(names, (1, 1, channels))
        self.class_token_names = names
        if pos_embed:
            length = self.grid[0] * self.grid[1] + len(names)
            shapes['pos_embed'] = (1, length, channels)
        self._make_tokens(**shapes)
        self._freeze()

    def token_positions(self, patches: int) -> tuple[int, ...]:
        """Indices of the class tokens in a sequence with that many patches."""
        return token_positions(patches, len(self.class_token_names), self._placement)

    def embed(
        self, patches: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add position embeddings to the patches and to the class tokens."""
        tokens = [getattr(self, name) for name in self.class_token_names]
        tokens = torch.cat(tokens, dim=1) if tokens else None
        if 'pos_embed' not in self.token_names:
            return patches, tokens
        # Stored in the order of the sequence, with the class tokens in their places.
        positions = self.token_positions(self.grid[0] * self.grid[1])
        grid, others = split_tokens(self.pos_embed, positions)
        patches = patches + resize_position(grid, self.grid, size)
        return patches, None if tokens is None else tokens + others


# Number of class tokens in a file -> their place. A single one may be anywhere.
_CHECKPOINT_PLACEMENTS = {0: 'head', 2: 'ends'}


def _head(backbone: Vim, arch: str, num_classes: int, **options: Any) -> ClassTokenHead:
    return ClassTokenHead(backbone.out_channels[-1], num_classes, **options)


def _file_format(keys: Iterable[str]) -> str:
    """``'vim'``, or ``'vim-fpn'`` for a backbone that contains a pyramid."""
    return 'vim-fpn' if has_pyramid(keys) else 'vim'


def _fit(
    state: Mapping[str, torch.Tensor],
    backbone: Vim,
    grids: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Fit the position embedding of a file to the model's tokens and grid.

    The place of a vector in the sequence says whether it belongs to a class token or to
    a patch. A vector for a token that the model does not have is left out. A token for
    which the file has no vector keeps its initial value.

    Args:
        state: Backbone of the file, converted.
        backbone: The model.
        grids: Rows and columns that the file says it has; see :class:`Family`.

    Returns:
        The tensors for the model, and notes on what was changed.

    Raises:
        CheckpointError: The file is deeper than the model's arch, or its grid is not
            known.
    """
    check_depth(state, backbone)
    state = dict(state)
    if not can_fit(state, backbone):
        return state, []
    tokens = sum(key.startswith('cls_token') for key in state)
    patches = state['pos_embed'].shape[1] - tokens
    positions = token_positions(patches, tokens, _placement(tokens, backbone))
    grid, others = split_tokens(state['pos_embed'], positions)
    grid, notes = fit_grid(grid, backbone.grid, grids.get(''))

    wanted = backbone.token_positions(grid.shape[1])
    if len(wanted) != tokens:
        own = backbone.token_positions(backbone.grid[0] * backbone.grid[1])
        others = split_tokens(backbone.pos_embed.detach(), own)[1].to(grid)
        if tokens:
            notes.append(
                f'pos_embed was loaded without the vectors of class tokens at '
                f'{", ".join(map(str, positions))}'
            )
    state['pos_embed'] = insert_tokens(grid, others, wanted)
    return state, notes


def _placement(tokens: int, backbone: Vim) -> str:
    """Place of the class tokens of a file; the model knows it, the file does not."""
    if tokens in _CHECKPOINT_PLACEMENTS:
        return _CHECKPOINT_PLACEMENTS[tokens]
    if backbone.cls_token_place in ('head', 'middle'):
        return backbone.cls_token_place
    return backbone.pretrained_cls_token


FAMILY = register_family(
    Family(
        name='vim',
        title='Vim',
        backbone=Vim,
        archs=ARCH_ZOO,
        head=_head,
        classifier_args=dict(classification=True, cls_token='middle'),
        signature=r'layers\.\d+\.mixer\.A_log',
        unless='pos_embed_cls',  # A name of Mamba®, which has the same mixer.
        depth=block_depth,
        describe=partial(describe, archs=ARCH_ZOO, name='vim', title='Vim'),
        component=component,
        target_layer=second_last_mixer,
        file_format=_file_format,
        rename=rename,
        fit=_fit,
    )
)
