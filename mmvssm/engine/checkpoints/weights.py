"""Refuse a checkpoint that does not belong to the model.

mmengine loads with ``strict=False``: whatever does not fit is left at its
random values, and the test that follows reports a mIoU near zero.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from mmvssm.checkpoints import CheckpointError, trust
from mmvssm.checkpoints.canonical import split_keys, to_canonical
from mmvssm.checkpoints.load import fits, refuse_nan
from mmvssm.checkpoints.read import read_state_dict, read_weights
from mmvssm.engine.checkpoints.start import pretrained_entries
from mmvssm.engine.errors import UsageError, require_file
from mmvssm.families import recognise

# Has weights that no prediction uses.
_OPTIONAL = 'auxiliary_head.'


def load_weights(model: nn.Module, path: str, weights: str | None = None) -> None:
    """Load all of a model, or nothing, and log what was loaded.

    Every entry of the model must be in the file in its shape, but for the
    auxiliary head's. Published files of this package's families are
    converted on the way.

    Args:
        model: The segmentor, detector or classifier, or a TTA or DDP wrapper around it.
        path: ``.pth`` or ``.safetensors`` file, an address, or a name of the zoo.
        weights: ``'raw'`` or ``'ema'``, of a file with both.

    Raises:
        UsageError: No such file, or it does not belong to the model; the
            message counts what matched in each part of the model.
        CheckpointError: The file cannot be read, or weights are NaN or infinite.
    """
    require_file(path, 'checkpoint')
    model = unwrap(model)
    state, notes = _read_for(model, path, weights)
    wanted = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(_OPTIONAL)
    }
    if unfit := _unfit(state, wanted):
        raise UsageError(
            f'{path} does not belong to this config:\n'
            f'{_differences(state, wanted, unfit)}\n'
            'Give the config the checkpoint was trained with. (A backbone '
            'alone is a start for training: tools/train.py --pretrained.)'
        )
    state = {key: value for key, value in state.items() if key in wanted}
    # A class whose score is NaN is the most likely one: wrong, without an error.
    refuse_nan(state, path)
    model.load_state_dict(state, strict=False)
    # For the model card.
    model.loaded_from = (*getattr(model, 'loaded_from', ()), path)
    report = f'loaded all {len(wanted)} tensors of the model from {path}'
    print_log('\n  '.join([report, *notes]), 'current')


def check_load_from(model: nn.Module, path: str) -> None:
    """Check that training would start from the whole backbone of the file.

    Heads may differ, as they do in fine-tuning: those that fit are loaded.

    Args:
        model: The segmentor, or a wrapper around it.
        path: What ``load_from`` names, loaded by mmengine later.

    Raises:
        UsageError: A tensor of the backbone would be left as it is.
        CheckpointError: The file cannot be read.
    """
    check_start(unwrap(model).state_dict(), path)


def check_start(wanted: Mapping[str, Tensor], path: str) -> None:
    """Do what :func:`check_load_from` does.

    Args:
        wanted: State dict of the whole model; tensors without data will do.
        path: What ``load_from`` names.
    """
    require_file(path, 'checkpoint')
    given = _read(path)
    wanted = {
        key: value for key, value in wanted.items() if key.startswith('backbone.')
    }
    if unfit := _unfit(given, wanted):
        raise UsageError(
            f'load_from={path} does not have this backbone:\n'
            f'{_differences(given, wanted, unfit)}\n'
            'A backbone or classifier alone goes to tools/train.py '
            '--pretrained; a published segmentor goes through '
            'tools/convert_checkpoint.py first.'
        )


def check_resumed(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that a training would go on with the weights it had.

    Args:
        wanted: State dict of the whole model to be trained; tensors without data will
            do.
        state: The ``state_dict`` of the checkpoint, loaded by mmengine later.

    Raises:
        UsageError: It lacks some, or has them in another shape.
    """
    if unfit := _unfit(state, wanted):
        raise UsageError(
            'the checkpoint to resume from is of another model:\n'
            f'{_differences(state, wanted, unfit)}\n'
            'Give the config it was trained with, or start from its weights: '
            '--cfg-options load_from=PATH, without --resume.'
        )


def trust_checkpoints(cfg: Config) -> None:
    """Let the checkpoints that a training starts from run the code they hold.

    See :func:`mmvssm.checkpoints.trust`.

    Args:
        cfg: Its ``load_from`` or the checkpoint hook's ``start_from``, every
            ``init_cfg`` of the model and, where it resumes, its ``work_dir``.
    """
    paths = [entry.get('checkpoint') for entry in pretrained_entries(cfg.model)]
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    paths += [cfg.get('load_from'), hook.get('start_from')]
    if cfg.get('resume'):
        paths.append(cfg.work_dir)
    for path in filter(None, paths):
        trust(path)


def unwrap(model: nn.Module) -> nn.Module:
    """The model within wrappers for several processes or augmented tests."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _read_for(
    model: nn.Module, path: str, weights: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors by the names of a model and fitted to it, and notes on that."""
    read = read_weights(path, weights)
    notes = list(read.notes)
    if read.copy:
        also = f' (the file also holds {", ".join(read.others)})' if read.others else ''
        notes.insert(0, f'weights: {read.copy}{also}')
    read = replace(read, tensors=_bare_names(read.tensors, path))
    try:
        checkpoint = to_canonical(read, path)
        owner = recognise(model.state_dict(), 'the model')
    except CheckpointError:
        # Another family's: its names are the model's, or it is refused.
        return read.tensors, notes
    own, others = split_keys(model.state_dict(), owner.prefix)
    names = {**others, **own}
    if owner.family is checkpoint.family:
        backbone = model.get_submodule(owner.prefix.removesuffix('.'))
        checkpoint.backbone, more = owner.family.fit(
            checkpoint.backbone, backbone, checkpoint.grids
        )
        notes += more
    return {names.get(key, key): x for key, x in checkpoint.tensors.items()}, notes


def _read(path: str) -> dict[str, Tensor]:
    return _bare_names(read_state_dict(path), path)


def _bare_names(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    state = {}
    for key, value in tensors.items():
        name = key.removeprefix('module.')
        if name in state:
            raise CheckpointError(f'{path} has {name} twice, once behind module.')
        state[name] = value
    return state


def _unfit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names in the model that nothing of the file can be loaded into."""
    return [
        key
        for key, value in wanted.items()
        if key not in given or not fits(given[key], value)
    ]


def _differences(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], unfit: list[str]
) -> str:
    total = Counter(key.split('.')[0] for key in wanted)
    bad = Counter(key.split('.')[0] for key in unfit)
    lines = [
        f'    {part}: {number - bad[part]} of {number} tensors match'
        for part, number in total.items()
    ]
    left = sum(key not in wanted and not key.startswith(_OPTIONAL) for key in given)
    lines.append(f'    in the file only: {left}')
    key = unfit[0]
    found = 'is not in the file'
    if key in given:
        found = f'is {tuple(given[key].shape)} in the file'
        if given[key].shape == wanted[key].shape:
            found = f'holds {given[key].dtype} in the file'
    lines.append(f'    first misfit: {key} {tuple(wanted[key].shape)} {found}')
    return '\n'.join(lines)
