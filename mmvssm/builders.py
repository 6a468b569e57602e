"""Models by name, for plain PyTorch."""

import difflib
import fnmatch
from typing import Any

from torch import nn

from mmvssm.families import Family, models
from mmvssm.heads import ImageClassifier


def list_models(pattern: str | None = None) -> list[str]:
    """Names of all models, sorted.

    Args:
        pattern: List only names that match this shell pattern, such as
            ``'vmamba_t*'``.
    """
    return fnmatch.filter([name for name, _, _ in models()], pattern or '*')


def build_classifier(
    name: str, num_classes: int = 1000, head: dict | None = None, **kwargs: Any
) -> ImageClassifier:
    """Build an image classifier: image (B, 3, H, W) -> logits (B, K).

    Args:
        name: One of :func:`list_models`.
        num_classes: K.
        head: More arguments of the head. The head of Mamba® takes ``pooling`` and
            ``reduce``, see :class:`mmvssm.heads.RegisterHead`.
        **kwargs: More arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
    """
    family, arch = _find(name)
    backbone = family.backbone(arch, **{**family.classifier_args, **kwargs})
    classifier = family.head(backbone, arch, num_classes, **(head or {}))
    return ImageClassifier(backbone, classifier)


def build_backbone(
    name: str, out_indices: tuple[int, ...] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a backbone: image (B, 3, H, W) -> tuple of (B, C, H, W) maps.

    Args:
        name: One of :func:`list_models`.
        out_indices: Stages whose maps are returned; for an isotropic backbone, blocks.
            By default all four stages, or the last block of each quarter.
        **kwargs: More arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
    """
    family, arch = _find(name)
    if out_indices is not None:
        kwargs['out_indices'] = out_indices
    return family.backbone(arch, **kwargs)


def _find(name: str) -> tuple[Family, str]:
    known = {model: (family, arch) for model, family, arch in models()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f'known are {list(known)}.'
        if near:
            hint = f'did you mean {" or ".join(near)}?'
        raise ValueError(
            f"unknown model '{name}'; {hint} mmvssm.list_models() lists all"
        )
    return known[name]
