"""Models by name, for plain PyTorch."""

import difflib
import fnmatch
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmvssm import zoo
from mmvssm.checkpoints import load_checkpoint
from mmvssm.errors import ZooError
from mmvssm.families import Family, models
from mmvssm.heads import ImageClassifier


def list_models(pattern: str | None = None, pretrained: bool = False) -> list[str]:
    """Names of all models, sorted.

    Args:
        pattern: List only names that match this shell pattern, such as
            ``'vmamba_t*'``.
        pretrained: Keep models that ``pretrained=True`` finds weights for.
    """
    names = fnmatch.filter([name for name, _, _ in models()], pattern or '*')
    return [name for name in names if not pretrained or _has_weights(name)]


def build_classifier(
    name: str,
    num_classes: int = 1000,
    head: dict | None = None,
    *,
    pretrained: bool | str = False,
    weights: str | None = None,
    **kwargs: Any,
) -> ImageClassifier:
    """Build an image classifier: image (B, 3, H, W) -> logits (B, K).

    Args:
        name: One of :func:`list_models`.
        num_classes: K.
        head: More arguments of the head. The head of Mamba® takes ``pooling`` and
            ``reduce``, see :class:`mmvssm.heads.RegisterHead`.
        pretrained: True for the published weights of the model, downloaded once; or
            any checkpoint that :func:`mmvssm.load_checkpoint` takes. The report is
            logged.
        weights: ``'raw'`` or ``'ema'``; see :func:`mmvssm.load_checkpoint`.
        **kwargs: More arguments of the backbone.

    Raises:
        ValueError: The name is unknown.
        ZooError: Nothing was published for the model, or it cannot be downloaded.
        CheckpointError: The checkpoint does not fit.
    """
    family, arch = _find(name)
    backbone = family.backbone(arch, **{**family.classifier_args, **kwargs})
    classifier = family.head(backbone, arch, num_classes, **(head or {}))
    net = ImageClassifier(backbone, classifier)
    _remember(
        net, 'classifier', name=name, num_classes=num_classes, head=head, **kwargs
    )
    _load(net, name, pretrained, weights)
    return net


def build_backbone(
    name: str,
    out_indices: tuple[int, ...] | None = None,
    *,
    pretrained: bool | str = False,
    weights: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a backbone: image (B, 3, H, W) -> tuple of (B, C, H, W) maps.

    Args:
        name: One of :func:`list_models`.
        out_indices: Stages whose maps are returned; for an isotropic backbone, blocks.
            By default all four stages, or the last block of each quarter.
        pretrained, weights: See :func:`build_classifier`.
        **kwargs: More arguments of the backbone.

    Raises:
        ValueError, ZooError, CheckpointError: See :func:`build_classifier`.
    """
    family, arch = _find(name)
    if out_indices is not None:
        kwargs['out_indices'] = out_indices
    net = family.backbone(arch, **kwargs)
    _remember(net, 'backbone', name=name, **kwargs)
    _load(net, name, pretrained, weights)
    return net


def _remember(net: nn.Module, kind: str, **arguments: Any) -> None:
    """Note how to build it again; :func:`mmvssm.save_pretrained` writes that down."""
    net.built_as = dict(kind=kind, arguments=arguments)


def _has_weights(name: str) -> bool:
    return name in zoo.TABLE and zoo.TABLE[name].url is not None


def _load(
    net: nn.Module, name: str, pretrained: bool | str, weights: str | None
) -> None:
    if pretrained is False:
        return
    if pretrained is True:
        if not _has_weights(name):
            raise ZooError(
                f"no weights were ever published for '{name}'; "
                'mmvssm.list_models(pretrained=True) lists the models that have some'
            )
        pretrained = f'{zoo.SCHEME}{name}'
    print_log(str(load_checkpoint(net, pretrained, weights=weights)), 'current')


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
