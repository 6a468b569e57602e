"""Models by name, for plain PyTorch."""

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmvssm.backbones.mambar import ARCH_ZOO as MAMBAR_ARCHS
from mmvssm.backbones.mambar import MambaR
from mmvssm.backbones.mlla import ARCH_ZOO as MLLA_ARCHS
from mmvssm.backbones.mlla import MLLA
from mmvssm.backbones.vim import ARCH_ZOO as VIM_ARCHS
from mmvssm.backbones.vim import Vim
from mmvssm.backbones.vssm import ARCH_ZOO as VSSM_ARCHS
from mmvssm.backbones.vssm import VSSM
from mmvssm.heads import (
    ClassificationHead,
    ClassTokenHead,
    ImageClassifier,
    RegisterHead,
)

# Published: by how much each register of an arch is reduced for the head.
_REGISTER_REDUCTION = dict(t=1, s=2, b=4, l=8)


@dataclass(frozen=True)
class _Family:
    backbone: type[nn.Module]
    archs: dict
    # Backbone, arch, number of classes, options -> head.
    head: Callable[..., nn.Module]
    # Arguments of the backbone when a head of its own follows.
    classifier_kwargs: dict


def _map_head(
    backbone: VSSM | MLLA, arch: str, num_classes: int, **options: Any
) -> nn.Module:
    return ClassificationHead(backbone.out_channels[-1], num_classes, **options)


def _class_token_head(
    backbone: Vim, arch: str, num_classes: int, **options: Any
) -> nn.Module:
    return ClassTokenHead(backbone.out_channels[-1], num_classes, **options)


def _register_head(
    backbone: MambaR, arch: str, num_classes: int, **options: Any
) -> nn.Module:
    registers = backbone.num_registers
    defaults = dict(
        reduce=_REGISTER_REDUCTION[arch],
        pooling='concat' if registers else 'patches',
    )
    return RegisterHead(
        backbone.out_channels[-1], num_classes, registers, **{**defaults, **options}
    )


_FAMILIES = {
    'vmamba': _Family(
        VSSM, VSSM_ARCHS, _map_head, dict(out_indices=(3,), out_norm=False)
    ),
    'vim': _Family(
        Vim, VIM_ARCHS, _class_token_head, dict(classification=True, cls_token='middle')
    ),
    'mambar': _Family(MambaR, MAMBAR_ARCHS, _register_head, dict(classification=True)),
    'mlla': _Family(
        MLLA, MLLA_ARCHS, _map_head, dict(out_indices=(3,), out_norm=False)
    ),
}
_MODELS = {
    f'{name}_{arch}': (family, arch)
    for name, family in _FAMILIES.items()
    for arch in family.archs
}


def list_models(pattern: str | None = None) -> list[str]:
    """Names of all models, sorted.

    Args:
        pattern: Keep names that match this shell pattern, such as
            ``'vmamba_t*'``.
    """
    return sorted(fnmatch.filter(_MODELS, pattern or '*'))


def build_classifier(
    name: str, num_classes: int = 1000, head: dict | None = None, **kwargs: Any
) -> ImageClassifier:
    """Build an image classifier: image (B, 3, H, W) -> logits (B, K).

    Args:
        name: One of :func:`list_models`.
        num_classes: K.
        head: Further arguments of the head. That of Mamba® takes ``pooling``
            and ``reduce``, see :class:`mmvssm.heads.RegisterHead`.
        **kwargs: Further arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
    """
    family, arch = _find(name)
    backbone = family.backbone(arch, **{**family.classifier_kwargs, **kwargs})
    classifier = family.head(backbone, arch, num_classes, **(head or {}))
    return ImageClassifier(backbone, classifier)


def build_backbone(
    name: str, out_indices: tuple[int, ...] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a backbone: image (B, 3, H, W) -> tuple of (B, C, H, W) maps.

    Args:
        name: One of :func:`list_models`.
        out_indices: Stages whose maps are returned, of a plain backbone blocks;
            by default all four stages, or the last block of each quarter.
        **kwargs: Further arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
    """
    family, arch = _find(name)
    if out_indices is not None:
        kwargs['out_indices'] = out_indices
    return family.backbone(arch, **kwargs)


def _find(name: str) -> tuple[_Family, str]:
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5)
        hint = (
            f'did you mean {" or ".join(near)}?'
            if near
            else f'known are {list_models()}'
        )
        raise ValueError(
            f"unknown model '{name}'; {hint} mmvssm.list_models() lists all"
        )
    return _MODELS[name]
