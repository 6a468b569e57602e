"""Refuse a checkpoint that does not belong to the model.

mmengine loads with ``strict=False``: whatever does not fit is left at its
random values, and the test that follows reports a mIoU near zero.
"""
import pickle
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .errors import UsageError, require_file


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a segmentor's checkpoint file.

    Args:
        path: A file mmengine wrote, or one that holds a bare state dict.

    Returns:
        A dict with ``state_dict`` and ``meta`` (empty if the file has none).

    Raises:
        UsageError: No such file, or a file that is not a checkpoint.
    """
    require_file(path, 'checkpoint')
    try:
        content = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except (EOFError, OSError, RuntimeError, ValueError,
            pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f'{path} cannot be read as a checkpoint; it may be '
                         f'cut short. ({reason})') from error
    if isinstance(content, Mapping):
        weights = content.get('state_dict', content)
        if weights and all(isinstance(v, Tensor) for v in weights.values()):
            return dict(state_dict=weights, meta=content.get('meta') or {})
    raise UsageError(f'{path} holds no state dict of a segmentor.')


def verify_checkpoint(model: nn.Module, path: str) -> dict[str, Any]:
    """Check that a checkpoint fills the model before anybody relies on it.

    Every entry of the model must be there in its shape, except those of the
    auxiliary head, which no prediction uses.

    Args:
        model: The segmentor, or a TTA or DDP wrapper around it.
        path: The checkpoint file.

    Returns:
        What :func:`read_checkpoint` returns.

    Raises:
        UsageError: The file cannot be read, or does not belong to the model;
            the message counts what matched in each part of the model.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    checkpoint = read_checkpoint(path)
    given = {k.removeprefix('module.'): v.shape
             for k, v in checkpoint['state_dict'].items()}
    wanted = {k: v.shape for k, v in model.state_dict().items()
              if not k.startswith('auxiliary_head.')}
    unfit = [k for k, shape in wanted.items() if given.get(k) != shape]
    if unfit:
        raise UsageError(_misfit(path, given, wanted, unfit))
    return checkpoint


def _misfit(path: str, given: dict, wanted: dict, unfit: list[str]) -> str:
    total = Counter(key.split('.')[0] for key in wanted)
    bad = Counter(key.split('.')[0] for key in unfit)
    counts = '\n'.join(f'    {part}: {number - bad[part]} of {number} match'
                       for part, number in total.items())
    key = unfit[0]
    found = (f'is {tuple(given[key])} in the file'
             if key in given else 'is not in the file')
    others = sum(k not in wanted and not k.startswith('auxiliary_head.')
                 for k in given)
    return (f'{path} does not belong to this config:\n{counts}\n'
            f'    in the file but not in the model: {others}\n'
            f'First misfit: {key} {tuple(wanted[key])} {found}.\n'
            'Give the config the checkpoint was trained with. (A backbone '
            'alone is a start for training: tools/train.py --pretrained.)')
