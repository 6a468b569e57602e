"""Models by name, for plain PyTorch."""

import difflib
import fnmatch
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmvssm.backbones.vssm import ARCH_ZOO as VSSM_ARCHS
from mmvssm.backbones.vssm import VSSM
from mmvssm.heads import ClassificationHead, ImageClassifier


@dataclass(frozen=True)
class _Family:
    backbone: type[nn.Module]
    archs: dict
    head: type[nn.Module]
    # Arguments of the backbone when a head of its own follows.
    classifier_kwargs: dict


_FAMILIES = {
    'vmamba': _Family(
        VSSM, VSSM_ARCHS, ClassificationHead, dict(out_indices=(3,), out_norm=False)
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
    name: str, num_classes: int = 1000, **kwargs: Any
) -> ImageClassifier:
    """Build an image classifier: image (B, 3, H, W) -> logits (B, K).

    Args:
        name: One of :func:`list_models`.
        num_classes: K.
        **kwargs: Further arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
    """
    family, arch = _find(name)
    backbone = family.backbone(arch, **family.classifier_kwargs, **kwargs)
    return ImageClassifier(
        backbone, family.head(backbone.out_channels[-1], num_classes)
    )


def build_backbone(
    name: str, out_indices: tuple[int, ...] = (0, 1, 2, 3), **kwargs: Any
) -> nn.Module:
    """Build a backbone: image (B, 3, H, W) -> tuple of (B, C, H, W) maps.

    Args:
        name: One of :func:`list_models`.
        out_indices: Stages whose maps are returned.
        **kwargs: Further arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
    """
    family, arch = _find(name)
    return family.backbone(arch, out_indices=out_indices, **kwargs)


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
