"""What of a file is changed to fit a model with other classes or channels."""

import math
from collections.abc import Mapping, MutableMapping

import torch

from mmvssm.errors import CheckpointError

_STEM = 'patch_embed.'


def adapt_stem(
    file: MutableMapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]
) -> list[str]:
    """Fit the filters of the stem to the number of image channels.

    One channel gets the sum over the filters' channels: a grey image then gives what
    the same image in three equal channels gives. More channels get the filters again
    and again, scaled by old over new number, so that sums keep their size.

    Args:
        file: Tensors of the backbone in a file, by name. Changed in place.
        model: Tensors of the model.

    Returns:
        A note if anything was changed.
    """
    for key, value in file.items():
        wanted = model.get(key)
        if not key.startswith(_STEM) or wanted is None:
            continue
        if value.ndim != 4 or wanted.ndim != 4:
            continue
        old, new = value.shape[1], wanted.shape[1]
        rest = (value.shape[0], *value.shape[2:])
        if old == new or rest != (wanted.shape[0], *wanted.shape[2:]):
            continue
        if new == 1:
            file[key] = value.sum(1, keepdim=True)
            return [f'{key} was summed over {old} image channels to 1']
        repeated = value.repeat(1, math.ceil(new / old), 1, 1)[:, :new]
        file[key] = repeated * (old / new)
        return [f'{key} was repeated from {old} image channels to {new}, and rescaled']
    return []


def fresh_heads(
    file: Mapping[str, torch.Tensor],
    model: Mapping[str, torch.Tensor],
    what: str,
    strict: bool,
) -> tuple[set[str], list[str]]:
    """Find layers whose number of classes is another one in the file.

    Args:
        file: Tensors of heads in a file, by name.
        model: Tensors of the model.
        what: How to call the file in an error message.
        strict: Refuse them.

    Returns:
        Names that stay as initialised, and a note for each layer.

    Raises:
        CheckpointError: There are some, and ``strict``.
    """
    layers = {}
    for key, value in file.items():
        wanted = model.get(key)
        if wanted is None or value.shape == wanted.shape or not value.ndim:
            continue
        # A layer without outputs is no head for another number of classes.
        if not value.numel():
            continue
        if value.ndim == wanted.ndim and value.shape[1:] == wanted.shape[1:]:
            layers[key.rpartition('.')[0]] = value.shape[0], wanted.shape[0]
    notes = [
        f'{layer} has {old} outputs in the file and {new} in the model, another number '
        'of classes: left as initialised'
        for layer, (old, new) in layers.items()
    ]
    if notes and strict:
        raise CheckpointError(f'{what} has another number of classes: {notes[0]}')
    return {key for key in model if key.rpartition('.')[0] in layers}, notes
