"""Convert a state dict on its way into a classifier of MMPretrain."""

from collections.abc import MutableMapping

from torch import Tensor, nn

from mmvssm.checkpoints.adapt import adapt_stem
from mmvssm.checkpoints.canonical import (
    mmpretrain_name,
    read_named,
    to_canonical,
)
from mmvssm.errors import CheckpointError
from mmvssm.families import family_of, recognise


def convert_for_classifier(
    backbone: nn.Module, state: MutableMapping[str, Tensor], prefix: str
) -> None:
    """Give the tensors of a published file the names in an ``ImageClassifier``.

    Position embeddings and the stem are fitted to the backbone, as
    :func:`mmvssm.load_checkpoint` does. A state dict of another kind, and one that
    fits as it is, stay as they are.

    Args:
        backbone: That of the classifier.
        state: Of a checkpoint. Changed in place.
        prefix: What precedes the names of the classifier in it, often nothing.

    Raises:
        CheckpointError: It holds a backbone of another family, or one that cannot be
            fitted.
    """
    given = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
    own = {f'backbone.{name}': v for name, v in backbone.state_dict().items()}
    if all(name in given and given[name].shape == own[name].shape for name in own):
        return
    content = _WithNotes(given)
    content._metadata = {} if prefix else getattr(state, '_metadata', {})
    try:
        read, what = read_named(content)
        found = recognise(read.tensors, what).family
    except CheckpointError:
        return
    family = family_of(backbone)
    if found is not family:
        raise CheckpointError(
            f'the checkpoint holds {found.title} weights, but the backbone '
            f'{type(backbone).__name__} is {family.title if family else "another one"}'
        )
    checkpoint = to_canonical(read, what)
    tensors, _ = family.fit(checkpoint.backbone, backbone, checkpoint.grids)
    adapt_stem(tensors, backbone.state_dict())
    for name in given:
        del state[prefix + name]
    for name, value in tensors.items():
        state[f'{prefix}backbone.{name}'] = value
    for name, value in checkpoint.others.items():
        state[prefix + mmpretrain_name(name)] = value


class _WithNotes(dict):
    """A dict that can hold what torch notes of the modules of a state dict."""
