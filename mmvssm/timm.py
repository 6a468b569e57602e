"""Every model of this package as a model of timm: import this module once.

    import timm
    import mmvssm.timm

    net = timm.create_model('vmamba_t_s1l8', pretrained=True, num_classes=10)
    maps = timm.create_model('vmamba_t_s1l8', features_only=True, in_chans=4)

Names are those of :func:`mmvssm.list_models`. Parameters have the names that they have
in :func:`mmvssm.build_classifier`, so checkpoints go from one to the other.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvssm import zoo
from mmvssm.checkpoints import load_checkpoint
from mmvssm.compat import why_no_timm
from mmvssm.errors import MissingPackageError
from mmvssm.families import Family, models, watch_families
from mmvssm.heads import ImageClassifier
from mmvssm.layers import split_tokens
from mmvssm.necks import PlainPyramid

if _reason := why_no_timm():
    raise MissingPackageError(
        f'mmvssm.timm registers models with timm, and there is {_reason}: run `make '
        'install-vision`, or install timm and a torchvision that fits your torch',
        name='timm',
    )

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    FeatureInfo,
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models._builder import pretrained_cfg_for_features

__all__ = ['Classifier', 'FeatureMaps']

# timm reads them when a model of this module is registered.
default_cfgs: dict[str, Any] = {}
_HEAD_OPTIONS = ('num_classes', 'global_pool', 'drop_rate', 'head')
# Strides of the maps that decoders of other packages expect.
_STRIDES = (4, 8, 16, 32)


class _Model:
    """What timm asks of a model with a ``backbone``, whatever is behind it."""

    backbone: nn.Module
    family: Family

    def load_pretrained(self, source: str) -> None:
        """Load a file, as :func:`mmvssm.load_checkpoint` does; log what matched."""
        print_log(str(load_checkpoint(self, source)), 'current')

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass to save memory."""
        for module in self.backbone.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay."""
        return {f'backbone.{name}' for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple]:
        """For layer decay: place of a parameter, by its name.

        Args:
            coarse: By stages rather than blocks, if there are stages.

        Returns:
            A function from a name to a tuple that sorts as the layers do: the stem, the
            blocks, then norms and heads.
        """

        def place(name: str) -> tuple:
            depth = None
            if name.startswith('backbone.'):
                depth = self.family.depth(name.removeprefix('backbone.'))
            if depth is None:
                return (float('inf'),)
            return (0, *(depth[:1] if coarse else depth))

        return place


class Classifier(_Model, ImageClassifier):
    """An image classifier with the methods of timm's.

    Args:
        family: Record of its family.
        arch: Name of the arch in the family.
        num_classes: 0 for no last layer: the output is then what it would get.
        in_chans: Channels of the image.
        global_pool: The pooling of the published head is the only one: ``'avg'`` of
            hierarchical models, ``'token'`` of isotropic ones. ``''`` with
            ``num_classes=0`` gives features that are not pooled.
        drop_rate: Dropout before the last layer, in training.
        head: More arguments of the head; see :func:`mmvssm.build_classifier`.
        **kwargs: More arguments of the backbone, such as ``drop_path_rate`` (None for
            that of the arch) and ``img_size``.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        family: Family,
        arch: str,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        head: dict | None = None,
        **kwargs: Any,
    ):
        options = _backbone_options(in_chans, kwargs)
        backbone = family.backbone(arch, **{**family.classifier_args, **options})
        # torch warns of a layer without outputs: one is made, and taken away below.
        classifier = family.head(backbone, arch, max(num_classes, 1), **(head or {}))
        super().__init__(backbone, classifier)
        self.family = family
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = backbone.out_channels[-1]
        self.head_hidden_size = classifier.head.in_features
        # Those of isotropic backbones, by which they classify.
        self.has_tokens = getattr(backbone, 'return_tokens', False)
        self.num_prefix_tokens = 0
        if self.has_tokens:
            self.num_prefix_tokens = len(backbone.token_positions(1))
        self.published_pool = 'token' if self.has_tokens else 'avg'
        self._probed = partial(_probe, family, arch, options)
        pool = self.published_pool if global_pool is None else global_pool
        self._set_pool(pool, num_classes)
        self.num_classes = num_classes
        if not num_classes:
            classifier.head = nn.Identity()

    @cached_property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and module of each stage, or each block if isotropic."""
        return _blocks_or_maps(self._probed())

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> features before pooling.

        Returns:
            The last map (B, C, H', W'), before the norm of the head. If isotropic, the
            normalised tokens and patches (B, n + H' * W', C), tokens first.
        """
        out = self.backbone(x)[-1]
        if not self.has_tokens:
            return out
        patches, tokens = out
        return torch.cat((tokens, patches.flatten(2).mT), 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits (B, num_classes), or what the last layer gets."""
        if not self.global_pool:
            norm = getattr(self.classifier, 'norm', None)
            return x if norm is None or self.has_tokens else norm(x)
        if self.has_tokens:
            tokens, patches = x.tensor_split((self.num_prefix_tokens,), 1)
            x = patches.mT.unsqueeze(-1), tokens
        x = F.dropout(self.classifier.pre_logits(x), self.drop_rate, self.training)
        return x if pre_logits else self.classifier.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> Any:
        """Features, and the maps of stages or blocks on the way to them.

        Args:
            x: Image (B, in_chans, H, W).
            indices: Stages, or blocks of an isotropic model; an integer for the last
                ones, None for all.
            norm: Not available: stages and blocks have no norm in common.
            stop_early: No effect: all blocks are computed.
            output_fmt: ``'NCHW'``.
            intermediates_only: Return the maps alone.
            return_prefix_tokens: Pairs of a map and its tokens (B, n, C) instead of
                maps.

        Raises:
            ValueError: An argument is out of range.
        """
        if norm or output_fmt != 'NCHW':
            raise ValueError(
                'forward_intermediates gives maps without norm in NCHW: leave norm and '
                f'output_fmt out, got norm={norm}, output_fmt={output_fmt!r}'
            )
        taken = _taken(indices, len(self.feature_info))
        modules = [self.get_submodule(self.feature_info[i]['module']) for i in taken]
        with _recorded(modules) as outputs:
            features = self.forward_features(x)
        maps = [self._unfolded(out, tuple(x.shape[2:])) for out in outputs]
        if not return_prefix_tokens:
            maps = [out for out, _ in maps]
        return maps if intermediates_only else (features, maps)

    def _unfolded(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The map of a stage, or that of a sequence (B, L, C), and its tokens."""
        if not self.has_tokens:
            return x, x.new_zeros(len(x), 0, x.shape[1])
        rows, columns = self.backbone.map_sizes(size)[-1]
        positions = self.backbone.token_positions(rows * columns)
        patches, tokens = split_tokens(x, positions)
        return patches.mT.unflatten(2, (rows, columns)), tokens

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Make a new last layer.

        Args:
            num_classes: 0 for none.
            global_pool: See the class; None to leave it.

        Raises:
            ValueError: See the class.
        """
        pool = self.global_pool if global_pool is None else global_pool
        self._set_pool(pool, num_classes)
        self.num_classes = num_classes
        self.classifier.head = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            head = nn.Linear(self.head_hidden_size, num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.classifier.head = head.to(like.device, like.dtype)

    def _set_pool(self, pool: str, num_classes: int) -> None:
        if pool not in ('', self.published_pool):
            raise ValueError(
                f"global_pool of this {self.family.title} is '{self.published_pool}', "
                f"or '' for features that are not pooled, got {pool!r}; head=dict(...) "
                'takes the options of its head'
            )
        if not pool and num_classes:
            raise ValueError(
                "global_pool='' gives features that are not pooled, which the last "
                f'layer cannot take: set num_classes=0, too, got {num_classes}'
            )
        self.global_pool = pool


class FeatureMaps(_Model, BaseModule):
    """Maps of a backbone: what ``features_only=True`` builds.

    Args:
        family: Record of its family.
        arch: Name of the arch in the family.
        in_chans: Channels of the image.
        out_indices: Which maps: numbers from the first or, below 0, from the last; or
            how many of the last. By default all, which have strides of 4 to 32 pixels.
        pyramid: Of isotropic backbones, whose maps have one size: resize them to these
            strides by a :class:`mmvssm.necks.PlainPyramid`, which is to be trained. If
            False, ``out_indices`` are numbers of blocks, and maps keep their size.
        **kwargs: More arguments of the backbone.

    Attributes:
        feature_info: timm's record of channels and strides.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        family: Family,
        arch: str,
        *,
        in_chans: int = 3,
        out_indices: int | Sequence[int] | None = None,
        pyramid: bool = True,
        **kwargs: Any,
    ):
        super().__init__()
        options = _backbone_options(in_chans, kwargs)
        probe = _probe(family, arch, options)
        plain = _is_isotropic(probe)
        self.family = family
        self.in_chans = in_chans
        self.neck = None
        if plain and pyramid:
            info = [
                dict(num_chs=channels, reduction=stride, module='neck')
                for channels, stride in zip(probe.out_channels, _STRIDES)
            ]
            taken = _taken(out_indices, len(info))
            blocks = [probe.out_indices[i] for i in taken]
            scales = [_scale(_strides(probe)[0], _STRIDES[i]) for i in taken]
            self.neck = PlainPyramid(probe.out_channels[0], scales=scales)
        else:
            info = _blocks_or_maps(probe)
            if out_indices is None and plain:
                out_indices = probe.out_indices
            taken = blocks = _taken(out_indices, len(info))
        self.backbone = family.backbone(arch, **options, out_indices=tuple(blocks))
        self.feature_info = FeatureInfo(info, tuple(taken))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_chans, H, W) -> maps (B, C, H / stride, W / stride)."""
        maps = self.backbone(x)
        if self.neck is None:
            return list(maps)
        maps = self.neck(maps)
        strides = self.feature_info.reduction()
        return [_sized(out, x, stride) for out, stride in zip(maps, strides)]


def _backbone_options(in_chans: int, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a backbone from those of timm.

    Raises:
        ValueError: A dilated model is asked for.
    """
    given = dict(given)
    if given.pop('output_stride', 32) != 32:
        raise ValueError(
            'the backbones of mmvssm cannot be dilated: leave output_stride out, or '
            'set it to 32'
        )
    return dict(given, in_channels=in_chans)


def _probe(family: Family, arch: str, options: dict[str, Any]) -> nn.Module:
    """The backbone with its default maps, without memory."""
    with torch.device('meta'):
        return family.backbone(arch, **options)


def _strides(probe: nn.Module) -> list[int]:
    side = 1024
    return [round(side / rows) for rows, _ in probe.map_sizes((side, side))]


def _is_isotropic(probe: nn.Module) -> bool:
    strides = _strides(probe)
    return len(strides) > 1 and len(set(strides)) == 1


def _blocks_or_maps(probe: nn.Module) -> list[dict[str, Any]]:
    """timm's description of stages or, of an isotropic backbone, of all blocks."""
    channels, strides = probe.out_channels, _strides(probe)
    if _is_isotropic(probe):
        channels, strides = (few[:1] * len(probe.layers) for few in (channels, strides))
    return [
        dict(num_chs=number, reduction=stride, module=f'backbone.layers.{i}')
        for i, (number, stride) in enumerate(zip(channels, strides, strict=True))
    ]


def _taken(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of so many maps are asked for.

    Raises:
        ValueError: Some of them do not exist.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        indices = range(-indices, 0)
    found = [i + count if i < 0 else i for i in indices]
    if not found or min(found) < 0 or max(found) >= count:
        raise ValueError(
            f'the model has {count} maps: indices go from 0 to {count - 1}, or from '
            f'-{count} to -1, got {tuple(indices)}'
        )
    return sorted(set(found))


def _scale(stride: int, wanted: int) -> float:
    return stride // wanted if stride >= wanted else stride / wanted


def _sized(x: Tensor, image: Tensor, stride: int) -> Tensor:
    """Overlapping patches leave the map a little smaller than decoders expect."""
    size = tuple(-(-side // stride) for side in image.shape[2:])
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode='bilinear', align_corners=False)


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The first output of each module, in order."""
    outputs = []
    handles = [
        module.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


# Registration


def _convert(state: dict[str, Any], model: _Model) -> dict[str, Tensor]:
    """Let timm load what is loaded already, from a file that the user named."""
    print_log(str(load_checkpoint(model, state)), 'current')
    return model.state_dict()


def _create(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model for timm's ``create_model``."""
    given = [_read_by_us(cfg) for cfg in (pretrained_cfg, pretrained_cfg_overlay)]
    remote = any(
        cfg.get('url') or cfg.get('hf_hub_id') for cfg in given if isinstance(cfg, dict)
    )
    if pretrained and cache_dir is not None and not remote:
        raise ValueError(
            'cache_dir has no effect on the weights of mmvssm: leave it out, and set '
            'the environment variable MMVSSM_CACHE_DIR'
        )
    (found,) = [(family, arch) for model, family, arch in models() if model == name]
    model = build_model_with_cfg(
        partial(FeatureMaps if features_only else Classifier, *found),
        name,
        pretrained,
        *given,
        pretrained_filter_fn=_convert,
        cache_dir=cache_dir,
        # What belongs to the head.
        kwargs_filter=_HEAD_OPTIONS if features_only else None,
        **kwargs,
    )
    cfg = model.pretrained_cfg
    if features_only:
        cfg = pretrained_cfg_for_features(cfg)
    # Set when weights are loaded: load_checkpoint has adapted the stem, not timm.
    stem = model.backbone.patch_embed.named_modules(prefix='backbone.patch_embed')
    convs = (part for part, module in stem if isinstance(module, nn.Conv2d))
    cfg['first_conv'] = next(convs, None)
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def _read_by_us(cfg: Any) -> Any:
    """Have what a config of the user names loaded by :func:`load_checkpoint`.

    Of a file with two copies of the weights timm would take another one, and a file in
    its default config comes before an address in that of the user.
    """
    if isinstance(cfg, dict) and any(map(cfg.get, ('file', 'url', 'hf_hub_id'))):
        return dict(file=None, custom_load=True) | cfg
    return cfg


def _default_cfg(name: str) -> PretrainedCfg:
    """How the published weights were tested, and where they are."""
    row = zoo.TABLE.get(name)
    known: dict[str, Any] = {}
    if row is not None and row.crop is not None:
        known = dict(
            input_size=(3, row.crop.size, row.crop.size),
            crop_pct=row.crop.ratio,
            interpolation=row.crop.interpolation,
            license=row.licence,
        )
    if row is not None and row.url is not None:
        # timm hands a file of a form of its own to load_pretrained, unread.
        known |= dict(file=f'{zoo.SCHEME}{name}', custom_load=True, origin_url=row.url)
    return PretrainedCfg(
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier='classifier.head',
        **known,
    )


def _register(family: Family) -> None:
    for arch in family.archs:
        name = f'{family.name}_{arch}'
        shown = name
        if is_model(name):
            if model_entrypoint(name).__module__ == __name__:
                continue
            shown = f'mmvssm_{name}'
            warnings.warn(
                f"timm has another model '{name}': that of mmvssm is '{shown}' in timm",
                stacklevel=2,
            )
        entry = _entry(name, shown)
        default_cfgs.update(generate_default_cfgs({shown: _default_cfg(name)}))
        globals()[shown] = register_model(entry)


def _entry(name: str, shown: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = shown
    create.__doc__ = f'The model ``{name}`` of mmvssm.'
    return create


watch_families(_register)
