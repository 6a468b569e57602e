"""Code that the backbones of all families share."""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, TruncNormalInit
from torch import Tensor, nn

from mmvssm.backbones.padding import masked_maps
from mmvssm.errors import CheckpointError
from mmvssm.families import family_of, layer_depths
from mmvssm.layers import resize_position
from mmvssm.ops import autocast

# Loads a checkpoint into a module and returns a report. mmvssm.checkpoints imports this
# file and sets this function.
_load_pretrained: Callable[..., Any] | None = None
# Converts a state dict on its way into a classifier of MMPretrain.
_convert_state: Callable[..., Any] | None = None


def set_pretrained_loader(load: Callable[..., Any]) -> None:
    """Set the function that carries out ``init_cfg=dict(type='Pretrained', ...)``.

    Args:
        load: Takes the module, the ``checkpoint``, ``prefix=`` and ``weights=``, and
            returns a report to print.
    """
    global _load_pretrained
    _load_pretrained = load


def set_state_converter(convert: Callable[..., Any]) -> None:
    """Set the function behind ``_checkpoint_filter`` of backbones.

    Args:
        convert: Takes the backbone, a state dict to change in place, and the prefix of
            the classifier in it.
    """
    global _convert_state
    _convert_state = convert


class Backbone(BaseModule):
    """An mmengine module that loads published checkpoints without conversion.

    A subclass computes maps in :meth:`compute_maps`, and tells their sizes by
    :meth:`whole_size` and :meth:`map_sizes`. It sets ``in_channels``, ``min_size`` and
    ``patch_embed``.

    Args:
        init_cfg, mask_padding: See :class:`VSSM`.
    """

    in_channels: int
    # Height and width of the smallest image, in pixels.
    min_size: int
    # The stem, which begins with a convolution.
    patch_embed: nn.Module

    def __init__(
        self, init_cfg: dict | list[dict] | None = None, mask_padding: bool = False
    ):
        super().__init__(init_cfg)
        self.mask_padding = mask_padding
        self._depths: tuple[dict[str, int], int] | None = None
        self._initialises = False

    def forward(
        self, x: Tensor, img_shapes: Sequence[Sequence[int]] | None = None
    ) -> tuple:
        """Compute the maps of ``out_indices``.

        Args:
            x: Images (B, in_channels, H, W), of the dtype of the weights.
            img_shapes: With ``mask_padding``, height and width of each image in
                pixels; what is below and to the right is padding. None: those that
                the data preprocessor ``mmvssm.DetDataPreprocessor``, or
                :func:`set_img_shapes`, has given the batch.

        Returns:
            What :meth:`compute_maps` returns. With ``mask_padding`` maps are zero
            beyond the image, and patches that an image or the batch does not fill
            are filled up with zeros rather than left out.

        Raises:
            ValueError: ``x`` is no batch of such images or of another dtype, or
                ``img_shapes`` does not fit, is missing, or is given without
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

    def check_images(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a batch that :meth:`compute_maps` takes."""
        name, size = type(self).__name__, self.min_size
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < size:
            raise ValueError(
                f'{name} takes images (B, {self.in_channels}, H, W) of at least '
                f'{size}x{size} pixels, got a tensor of shape {tuple(x.shape)}'
            )
        weight = next(self.patch_embed.parameters(), x)
        if x.dtype != weight.dtype and not _is_cast(x, weight):
            raise ValueError(
                f'the weights of {name} are {weight.dtype} and the images {x.dtype}: '
                f'pass images.to({weight.dtype}), normalised as in the training'
            )

    def whole_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The least image size of whole patches in which another one has room."""
        raise NotImplementedError

    def map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each map, of an image of whole patches."""
        raise NotImplementedError

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """How deep a parameter is, for MMPretrain's layer-wise learning rates.

        Args:
            param_name: Its name in the whole model.
            prefix: What precedes the names of the backbone there: ``'backbone.'``.

        Returns:
            0 for the stem, 1 + i for block i, n + 1 for what comes behind the n
            blocks; and n + 2.

        Raises:
            NotImplementedError: The backbone is of no registered family.
        """
        if self._depths is None:
            family = family_of(self)
            if family is None:
                raise NotImplementedError(
                    f'{type(self).__name__} is the backbone of no family that '
                    'mmvssm.register_family knows, so its blocks are not known'
                )
            names = [name for name, _ in self.named_parameters()]
            self._depths = layer_depths(family, names)
        depths, last = self._depths
        # Without the prefix it is a part of the neck or the head.
        inside = param_name.startswith(prefix)
        name = param_name.removeprefix(prefix)
        return depths.get(name, last) if inside else last, last + 1

    def _checkpoint_filter(
        self, state_dict: MutableMapping[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Let a classifier of MMPretrain load published files, in place.

        Its ``ImageClassifier`` calls this for all that is loaded into it.
        """
        _convert_state(self, state_dict, prefix)

    def apply(self, fn: Callable[[nn.Module], None]) -> 'Backbone':
        """Apply a function to all modules, but not an ``init_cfg`` of another module.

        That of a whole model, as configs of MMPretrain have it for all linear layers,
        would replace the published initialisation of step sizes and projections.
        """
        foreign = getattr(fn, '__module__', None) == TruncNormalInit.__module__
        if foreign and not self._initialises:
            return self
        return super().apply(fn)

    def init_weights(self) -> None:
        """Apply ``init_cfg``.

        ``dict(type='Pretrained', checkpoint=PATH_OR_NAME)``, with ``prefix`` and
        ``weights`` as further keys, goes through :func:`mmvssm.load_checkpoint`. The
        file is recognised and converted, and what matched is logged. A file that does
        not fit is an error; mmengine's own loader would continue without the weights.
        Without an ``init_cfg`` the module keeps the published initialisation that it
        has after construction.
        """
        given = self.init_cfg
        cfgs = [given] if given and isinstance(given, dict) else list(given or [])
        pretrained = [
            cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)
        ]
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        self._initialises = True
        super().init_weights()
        self._initialises = False
        self.init_cfg = given
        for cfg in pretrained:
            options = {key: cfg[key] for key in ('prefix', 'weights') if key in cfg}
            report = _load_pretrained(self, cfg['checkpoint'], **options)
            print_log(str(report), logger='current')


def _is_cast(x: Tensor, weight: Tensor) -> bool:
    """Whether images and the weights of a convolution get one dtype before it runs."""
    if not x.is_floating_point():
        return False
    # Weights in shards may get another dtype when they are gathered.
    if weight.ndim != 4 or hasattr(weight, 'placements'):
        return True
    return autocast.is_enabled(x) and torch.float64 not in (x.dtype, weight.dtype)


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
    """Whether it is an integer, and at least that value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def checked_indices(
    indices: Sequence[int], count: int, allowed: str
) -> tuple[int, ...]:
    """``out_indices`` as a tuple.

    Args:
        indices: What the user gave.
        count: Number of stages or blocks.
        allowed: What they may be, for the message.

    Raises:
        ValueError: They are none, or not increasing numbers below ``count``.
    """
    indices = tuple(indices)
    if (
        not indices
        or sorted(set(indices)) != list(indices)
        or indices[0] < 0
        or indices[-1] >= count
    ):
        raise ValueError(f'out_indices must be {allowed}, got {indices}')
    return indices


def check_in_channels(in_channels: int) -> None:
    """Raise ValueError unless it is a number of channels."""
    if not is_count(in_channels):
        raise ValueError(
            f'in_channels must be the number of channels of the image, 1 or more, got '
            f'{in_channels!r}'
        )


def parse_img_size(img_size: int | Sequence[int], smallest: int = 1) -> tuple[int, int]:
    """Turn one number, or height and width, into height and width.

    Args:
        img_size: In pixels.
        smallest: Smallest height and width.

    Raises:
        ValueError: It is neither of these, or too small.
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
    """Name of the model whose arch has these values, or the values in words.

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
    module.register_state_dict_post_hook(_note_grid)


# Not inside, or whole models could not be pickled.
def _note_grid(
    module: nn.Module, state: dict, prefix: str, metadata: dict[str, Any]
) -> None:
    metadata['grid'] = tuple(module.grid)


def fit_grid(
    embedding: Tensor,
    grid: tuple[int, int],
    stored: tuple[int, int] | None,
    name: str = 'pos_embed',
) -> tuple[Tensor, list[str]]:
    """Resize the position embedding of a file to the model's grid.

    If the file does not say its grid, a square one is assumed, as all published files
    have; if the number of patches is not a square number, the model's own grid.

    Args:
        embedding: (1, M, C), of the patches only.
        grid: Rows and columns of the model.
        stored: Rows and columns of the file, if it says so.
        name: Its name in messages.

    Returns:
        The embedding, and a note if it was resized or its grid is a guess.

    Raises:
        CheckpointError: The file does not say its grid, and the number of patches is
            neither a square number nor that of the model.
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
            f'are not a square grid, and the model has {grid[0]}x{grid[1]}; build the '
            f'model with the img_size of the file'
        )
    if old == grid:
        return embedding, []
    note = f'{name} was resized from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}'
    return resize_position(embedding, old, grid), [note]
