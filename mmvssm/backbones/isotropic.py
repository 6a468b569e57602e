"""Base of isotropic backbones (Vim, Mamba®): patches through one stack of blocks."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvssm.backbones.base import (
    Backbone,
    check_in_channels,
    checked_indices,
    describe_arch,
    is_count,
    note_grid,
    parse_img_size,
)
from mmvssm.errors import CheckpointError
from mmvssm.layers import (
    AddRMSNorm,
    DropPath,
    MambaBlock,
    channels_last,
    insert_tokens,
    rotary_angles,
    rotate,
    split_tokens,
)

ARCH_DEFAULTS = dict(
    patch_size=16, stride=16, d_state=16, d_conv=4, expand=2, drop_path_rate=0.1
)
_FEATURES = ('hidden', 'residual')
_LAST = ('none', 'add', 'norm')
_OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap')
_DIRECTIONS = ('both', 'shared_conv', 'alternate', 'forward')


class PatchEmbed(nn.Module):
    """Patches of an image, projected to C channels, as a map.

    Args:
        in_channels: Channels of the image.
        channels: C.
        patch_size: Side of a patch in pixels.
        stride: Distance of neighbouring patches in pixels.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride)
        # LeCun's normal initialisation, truncated at two standard deviations
        # and scaled so that it has the right one after that.
        std = self.proj.weight[0].numel() ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(channels_last(x))


class IsotropicMamba(Backbone):
    """A stack of bidirectional Mamba blocks on patches and extra tokens.

    A subclass makes the position embedding and the tokens: it sets
    ``token_names``, the names of those parameters, and overrides
    :meth:`token_positions` and :meth:`embed`.

    Args:
        arch: A dict with all keys of ``ARCH_DEFAULTS``, ``embed_dims`` and ``depth``.
        img_size: Height and width, or one number for both. Position embeddings are
            stored for the grid of patches of this size.
        in_channels, out_indices, frozen_stages, with_cp, drop_path_rate,
            average, residual_in_fp32, feature, last_layer_process,
            return_tokens, classification, out_type, init_cfg, mask_padding,
            directions, flip_sequences: See :class:`Vim`.
    """

    token_names: tuple[str, ...] = ()

    def __init__(
        self,
        arch: dict,
        *,
        img_size: int | tuple[int, int],
        in_channels: int,
        out_indices: Sequence[int] | None,
        frozen_stages: int,
        with_cp: bool,
        drop_path_rate: float | None,
        average: bool,
        residual_in_fp32: bool,
        feature: str,
        last_layer_process: str,
        return_tokens: bool,
        classification: bool,
        out_type: str | None,
        init_cfg: dict | list[dict] | None,
        mask_padding: bool = False,
        directions: str = 'both',
        flip_sequences: float = 0.0,
    ):
        super().__init__(init_cfg, mask_padding)
        check_in_channels(in_channels)
        check_choice('directions', directions, _DIRECTIONS)
        if not 0 <= flip_sequences <= 1:
            raise ValueError(
                f'flip_sequences is a probability from 0 to 1, got {flip_sequences}'
            )
        self.flip_sequences = flip_sequences
        channels, depth = arch['embed_dims'], arch['depth']
        self.depth = depth
        check_choice('feature', feature, _FEATURES)
        check_choice('last_layer_process', last_layer_process, _LAST)
        if out_type is not None:
            _check_out_type(out_type, return_tokens, mask_padding)
        self.out_type = out_type
        if classification:
            out_indices, last_layer_process = (depth - 1,), 'norm'
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']
        self.out_indices = _out_indices(out_indices, depth)
        num_blocks = self.out_indices[-1] + 1
        if not -1 <= frozen_stages <= num_blocks:
            raise ValueError(
                f'frozen_stages must be between -1 (nothing) and {num_blocks} (all '
                f'blocks built), got {frozen_stages}'
            )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.feature = feature
        self.last_layer_process = last_layer_process
        self.return_tokens = return_tokens or classification
        self.out_channels = (channels,) * len(self.out_indices)
        self.patch_size, self.stride = arch['patch_size'], arch['stride']
        self.min_size = self.patch_size
        self.rope = None
        self.rope_residual = False
        self.grid = self._grid_of(img_size)
        note_grid(self)

        self.patch_embed = PatchEmbed(
            in_channels, channels, self.patch_size, self.stride
        )
        # The next block drops the output of this one.
        rates = [0.0, *np.linspace(0, drop_path_rate, depth).tolist()]
        self.layers = nn.ModuleList(
            MambaBlock(
                channels,
                rates[i],
                residual_in_fp32,
                d_state=arch['d_state'],
                d_conv=arch['d_conv'],
                expand=arch['expand'],
                average=average,
                directions=_direction(directions, i),
            )
            for i in range(num_blocks)
        )
        self.drop_path = DropPath(rates[depth] if classification else 0.0)
        if last_layer_process == 'norm':
            self.norm_f = AddRMSNorm(channels, residual_in_fp32=residual_in_fp32)
        self._init_mixers(depth, as_published=classification)

    # Methods of the subclass

    def token_positions(self, patches: int) -> tuple[int, ...]:
        """Indices of the extra tokens in a sequence with that many patches."""
        raise NotImplementedError

    def embed(
        self, patches: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add positions to patches (B, H * W, C); also return the tokens (1, n, C)."""
        raise NotImplementedError

    # The forward pass

    def compute_maps(self, x: torch.Tensor) -> tuple:
        """Compute the maps of ``out_indices`` of images that fill the batch.

        Args:
            x: Image (B, in_channels, H, W), at least one patch high and wide.
                Rows and columns that do not fill a patch are dropped.

        Returns:
            One (B, C, H', W') map for each entry of ``out_indices``, contiguous, all of
            one size. With ``return_tokens``, pairs of a map and the tokens (B, n, C);
            with some ``out_type``, features (B, C).
        """
        self.check_images(x)
        x = self.patch_embed(x)
        size = tuple(x.shape[2:])
        positions = self.token_positions(size[0] * size[1])
        patches, tokens = self.embed(x.flatten(2).mT, size)
        if positions:
            tokens = tokens.to(patches.dtype).expand(x.shape[0], -1, -1)
        x = insert_tokens(patches, tokens, positions)
        rotation = self._rotation(x, size, positions)
        if self.training and self.flip_sequences and self._flips():
            rotation = rotation and tuple(table.flip(1) for table in rotation)
            outs = [out.flip(1) for out in self._run_blocks(x.flip(1), rotation)]
        else:
            outs = self._run_blocks(x, rotation)
        return tuple(self._unfold(out, size, positions) for out in outs)

    def whole_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The least image size of whole patches in which another one has room."""
        patch, stride = self.patch_size, self.stride
        return tuple(
            patch + -(-max(side - patch, 0) // stride) * stride for side in size
        )

    def map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each map, of an image of whole patches."""
        return [self._grid_of(size)] * len(self.out_indices)

    def _flips(self) -> bool:
        return torch.rand(()).item() < self.flip_sequences

    def _run_blocks(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, ...] | None
    ) -> list[torch.Tensor]:
        outs, residual = [], None
        for i, block in enumerate(self.layers):
            if rotation is not None:
                x = rotate(x, *rotation)
                if residual is not None and self.rope_residual:
                    residual = rotate(residual, *rotation)
            if self.with_cp and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, use_reentrant=False)
            else:
                x, residual = block(x, residual)
            # The stream that a block returns does not have its own output yet.
            if self.feature == 'residual' and i - 1 in self.out_indices:
                outs.append(residual)
            elif self.feature == 'hidden' and i in self.out_indices[:-1]:
                outs.append(x)
        return [*outs, self._process_last(x, residual)]

    def _process_last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.last_layer_process == 'none':
            return x
        if self.last_layer_process == 'add':
            return x + residual
        return self.norm_f(self.drop_path(x), residual)[0]

    def _rotation(
        self, x: torch.Tensor, size: tuple[int, int], positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine for every position; extra tokens are not rotated."""
        if self.rope is None:
            return None
        angles = rotary_angles(*size, x.shape[2], self.rope, like=x)[None]
        still = angles.new_zeros(1, len(positions), angles.shape[2])
        angles = insert_tokens(angles, still, positions)
        return angles.cos(), angles.sin()

    def _unfold(
        self, x: torch.Tensor, size: tuple[int, int], positions: Sequence[int]
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        patches, tokens = split_tokens(x, positions)
        if self.out_type == 'cls_token':
            return tokens.mean(1)
        if self.out_type == 'avg_featmap':
            return patches.mean(1)
        # Heads may pass the memory to compiled ops that expect NCHW
        # strides.
        out = patches.mT.unflatten(2, size).contiguous()
        pairs = self.return_tokens and self.out_type is None
        return (out, tokens) if pairs else out

    # Around it

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay.

        This is the rule of the published classification recipes: 1-d parameters,
        biases, tokens and position embeddings have no weight decay; ``A_log`` and
        ``A_b_log`` have it.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.endswith('.bias') or name in self.token_names
        }

    def train(self, mode: bool = True) -> 'IsotropicMamba':
        """Set the mode of all but the frozen stages."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.patch_embed, *self.layers[: self.frozen_stages]):
            module.eval().requires_grad_(False)
        for name in self.token_names:
            getattr(self, name).requires_grad_(False)

    def _grid_of(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        sides = parse_img_size(img_size, self.patch_size)
        return tuple((side - self.patch_size) // self.stride + 1 for side in sides)

    @torch.no_grad()
    def _init_mixers(self, depth: int, as_published: bool) -> None:
        """Change the mixer's initialisation as in the published models.

        In the published classifiers the step size of the backward direction starts at
        softplus(0) = 0.69. In segmentation and detection both directions start alike.
        """
        for block in self.layers:
            block.mixer.out_proj.weight.div_(math.sqrt(depth))
            if as_published and hasattr(block.mixer, 'dt_proj_b'):
                dt_proj = block.mixer.dt_proj_b
                dt_proj.reset_parameters()
                nn.init.zeros_(dt_proj.bias)

    def _make_tokens(self, **shapes: tuple[int, ...]) -> None:
        """Add parameters for tokens and positions, normal with deviation 0.02."""
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape))
            nn.init.trunc_normal_(parameter, std=0.02)
            self.register_parameter(name, parameter)
        self.token_names = tuple(shapes)
        if self.out_type == 'cls_token' and not self.token_positions(1):
            raise ValueError(
                "out_type='cls_token' needs a class token or registers, and this "
                f'{type(self).__name__} has none'
            )


def resolve_arch(arch: str | dict, zoo: dict[str, dict], family: str) -> dict:
    """Turn the name of an arch, or a dict with some of its keys, into all keys.

    Raises:
        ValueError: The name or a key is unknown, or a value is not a positive integer.
    """
    if isinstance(arch, str):
        if arch not in zoo:
            raise ValueError(
                f"unknown arch '{arch}' of {family}; use one of {sorted(zoo)} or a "
                f'dict with embed_dims and depth'
            )
        return zoo[arch]
    known = next(iter(zoo.values()))
    unknown = sorted(set(arch) - set(known))
    missing = [key for key in ('embed_dims', 'depth') if key not in arch]
    if unknown or missing:
        raise ValueError(
            f'arch of {family}: missing keys {missing}, unknown keys {unknown}; '
            f'known are {sorted(known)}'
        )
    arch = {**known, **arch}
    for key in known:
        if key == 'drop_path_rate':
            continue
        if not is_count(arch[key]):
            raise ValueError(
                f'arch of {family}: {key} must be a positive integer, got {arch[key]!r}'
            )
    return arch


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {tuple(choices)}, got {value!r}')


def _check_out_type(out_type: str, return_tokens: bool, mask_padding: bool) -> None:
    check_choice('out_type', out_type, _OUT_TYPES)
    if return_tokens:
        raise ValueError(
            f'return_tokens=True returns pairs of a map and tokens: leave it or '
            f'out_type={out_type!r} out'
        )
    if mask_padding and out_type != 'featmap':
        raise ValueError(
            f'mask_padding=True is for maps, and out_type={out_type!r} returns none: '
            'leave one of the two out'
        )


def _direction(directions: str, block: int) -> str:
    """``directions`` of the mixer of a block."""
    if directions == 'alternate':
        return 'backward' if block % 2 else 'forward'
    return directions


def _out_indices(indices: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """By default the last block of each quarter."""
    if indices is None:
        quarters = min(4, depth)
        return tuple(depth * (i + 1) // quarters - 1 for i in range(quarters))
    allowed = f'increasing block numbers from 0 to {depth - 1}'
    return checked_indices(indices, depth, allowed)


# Parts of the records of isotropic families

_RENAMES = (
    (r'(head|neck|norm_neck)\.', r'classifier.\1.'),
    # Upsampling layers, which the published segmentation backbone contains.
    (r'fpn1\.', 'neck.upsample_4x.'),
    (r'fpn2\.', 'neck.upsample_2x.'),
)
_RENAMES = tuple((re.compile(old), new) for old, new in _RENAMES)
# Names that are already renamed, and must not be renamed again.
_CURRENT = re.compile(r'neck\.upsample_')


def rename(key: str) -> str:
    """Turn a published or own name (without prefix) into our own name."""
    if _CURRENT.match(key):
        return key
    for old, new in _RENAMES:
        if old.match(key):
            return old.sub(new, key, count=1)
    return key


def has_pyramid(keys: Iterable[str]) -> bool:
    """Whether the backbone of the file contains layers of a neck."""
    return any(key.startswith(('fpn1.', 'fpn2.')) for key in keys)


def second_last_mixer(backbone: IsotropicMamba) -> nn.Module:
    """The mixer of the block before the last one, with an output (B, L, C).

    The output of the last mixer would not do: there the other tokens have no influence
    on the class token any more.
    """
    return backbone.layers[max(len(backbone.layers) - 2, 0)].mixer


def block_depth(name: str) -> tuple[int, ...] | None:
    """Position of a parameter; see ``depth`` of :class:`mmvssm.families.Family`."""
    if re.match(r'patch_embed\.|pos_embed(_cls)?$|cls_token(_\w+)?$', name):
        return ()
    match = re.match(r'layers\.(\d+)\.', name)
    return match and (int(match[1]),)


def component(key: str) -> str | None:
    """The part of the backbone that a name belongs to.

    A file has either the whole part or nothing of it. None for class tokens, the last
    norm and rotary tables, which only some models of the family have. The position
    embedding is part of the stem: without it the weights of a file are useless.
    """
    if key == 'pos_embed':
        return 'patch_embed.'
    match = re.match(r'patch_embed\.|layers\.\d+\.', key)
    return match and match[0]


def describe(
    state: Mapping[str, torch.Tensor],
    archs: Mapping[str, Mapping],
    name: str,
    title: str,
) -> str:
    """Name of the arch that current keys and their shapes belong to.

    Variants with another stride have the same weights, and get the name of the one with
    stride 16.
    """
    try:
        embed_dims, _, _, patch_size = state['patch_embed.proj.weight'].shape
        inner, d_state = state['layers.0.mixer.A_log'].shape
        d_conv = state['layers.0.mixer.conv1d.weight'].shape[2]
    except (KeyError, IndexError, ValueError):
        return f'an incomplete {title}'
    found = dict(
        embed_dims=embed_dims,
        depth=_count_blocks(state),
        patch_size=patch_size,
        d_state=d_state,
        d_conv=d_conv,
        expand=inner // embed_dims,
    )
    return describe_arch(found, archs, name, title)


def check_depth(state: Mapping[str, torch.Tensor], backbone: IsotropicMamba) -> None:
    """Refuse a file of a deeper arch, of which the first blocks would fit.

    Raises:
        CheckpointError: The file is deeper than the arch of the model.
    """
    depth = _count_blocks(state)
    if depth > backbone.depth:
        raise CheckpointError(
            f'the file does not fit the model: it has {depth} blocks, the arch of the '
            f'model {backbone.depth}'
        )


def can_fit(state: Mapping[str, torch.Tensor], backbone: IsotropicMamba) -> bool:
    """Whether file and model have position embeddings of the same width."""
    if 'pos_embed' not in state or 'pos_embed' not in backbone.token_names:
        return False
    return state['pos_embed'].shape[2:] == backbone.pos_embed.shape[2:]


def _count_blocks(state: Iterable[str]) -> int:
    blocks = [re.match(r'layers\.(\d{1,6})\.', key) for key in state]
    return max((int(match[1]) + 1 for match in blocks if match), default=0)
