"""The weights that a training starts from: one form, looked for early, checked.

A config can name them in many places: ``init_cfg`` of the whole model or a part of it,
``pretrained=`` of mmseg 0.x, ``load_from``. mmengine loads most of these with
``strict=False``: a wrong file gives a warning among hundreds of lines, and a training
from random weights.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmvssm import zoo
from mmvssm.backbones.base import Backbone
from mmvssm.checkpoints import CheckpointError, convert, load_checkpoint
from mmvssm.checkpoints.adapt import fresh_heads
from mmvssm.checkpoints.load import fits
from mmvssm.checkpoints.read import read_state_dict
from mmvssm.engine.checkpoints.files import has_checkpoints
from mmvssm.engine.configs.config import is_classifier
from mmvssm.engine.configs.data import check_datasets
from mmvssm.engine.errors import UsageError, require_file
from mmvssm.families import recognise
from mmvssm.registry import MODELS


def has_own_backbone(cfg: Config) -> bool:
    """Whether the config's model has a backbone of this package."""
    kind = (cfg.model.get('backbone') or {}).get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind)
    return isinstance(kind, type) and issubclass(kind, Backbone)


def choose_start(
    cfg: Config,
    pretrained: str | None = None,
    from_scratch: bool = False,
    weights: str | None = None,
    resume: str | None = None,
) -> list[str]:
    """Settle what a training starts from.

    Of a model with a backbone of this package, every way to name weights becomes an
    ``init_cfg``, and from now on this process carries those out by
    :func:`mmvssm.load_checkpoint`: what was loaded is logged, and a file that does not
    fit is an error. ``load_from`` fills the whole model, so that weights of the
    backbone alone are not needed beside it.

    Args:
        cfg: Changed in place; before :func:`mmvssm.engine.enable_resume`.
        pretrained: Weights of the backbone, in the place of the config's.
        from_scratch: Start from random weights.
        weights: ``'raw'`` or ``'ema'``, of a file with both.
        resume: What ``--resume`` names. All weights come from there, unless it is
            ``'auto'`` and there is nothing to go on from yet.

    Returns:
        Paths and addresses of all that is loaded.

    Raises:
        UsageError: Two of these exclude each other, or there are no weights to choose
            a copy of.
    """
    model = cfg.model
    if resume not in (None, 'auto') or (resume and _goes_on(cfg)):
        cfg.load_from, pretrained, from_scratch, weights = None, None, True, None
    # Beside resume=True it is what to resume from.
    whole = None if cfg.get('resume') else cfg.get('load_from')
    _refuse_contradictions(model, whole, pretrained, from_scratch)
    own = has_own_backbone(cfg)
    if own:
        _adopt_pretrained(model, whole_model=is_classifier(cfg))
    if from_scratch:
        for part in _parts(model):
            _drop_pretrained(part)
    if pretrained:
        _drop_pretrained(model)
        _drop_pretrained(model.backbone)
        _add_pretrained(model.backbone, pretrained)
    if own and whole:
        _drop_pretrained(model)
        _add_pretrained(model, whole)
        cfg.load_from = None
    if own and _pretrained(model):
        # It would be overwritten.
        _drop_pretrained(model.backbone)
    entries = pretrained_entries(model)
    found = [entry['checkpoint'] for entry in entries]
    if whole and not own:
        found.append(whole)
    if weights and not (own and entries):
        raise UsageError(
            f'--weights {weights} chooses a copy in a file, and this training starts '
            + ('by mmengine.' if found else 'from random weights.')
        )
    if own:
        for entry in entries:
            entry.update(
                type='Pretrained', **(dict(weights=weights) if weights else {})
            )
        WEIGHT_INITIALIZERS.register_module('Pretrained', True, CheckedPretrainedInit)
    return list(dict.fromkeys(found))


def _refuse_contradictions(
    model: ConfigDict, whole: str | None, pretrained: str | None, from_scratch: bool
) -> None:
    if from_scratch and (pretrained or whole):
        other = '--pretrained' if pretrained else f'load_from={whole}'
        raise UsageError(f'--from-scratch and {other} exclude each other.')
    if pretrained and whole:
        raise UsageError(
            f'--pretrained fills the backbone and load_from={whole} the whole model: '
            'leave one of the two out.'
        )
    if pretrained and 'backbone' not in model:
        raise UsageError(
            f'--pretrained fills the backbone, and the model {model.get("type")} has '
            'none: use load_from.'
        )


def check_inputs(cfg: Config, weights: list[str]) -> None:
    """Look for the data, then for the weights, then fetch what is missing of these.

    Args:
        cfg: The config.
        weights: What :func:`choose_start` returned.

    Raises:
        UsageError: Data or files of weights are missing; one message names both.
        ZooError: Weights cannot be downloaded.
    """
    absent = [source for source in weights if not _is_here(source)]
    try:
        check_datasets(cfg)
    except UsageError as error:
        if not absent:
            raise
        raise UsageError(f'{error}\n{_absent(absent)}') from error
    for source in weights:
        require_file(source, 'checkpoint')
    for source in absent:
        zoo.fetch(source)


def announce_start(cfg: Config, weights: list[str]) -> None:
    """Log from what a training starts; the report of what matched follows.

    Args:
        cfg: After :func:`mmvssm.engine.enable_resume`, if a training is to go on.
        weights: What :func:`choose_start` returned.
    """
    if cfg.get('resume') and (cfg.get('load_from') or _goes_on(cfg)):
        return  # mmengine says so.
    text = f'This training starts from {", ".join(weights) or "random weights"}'
    if cfg.get('resume'):
        text += ', unless there is a checkpoint to resume from'
    print_log(text, 'current')


def published_weights(config: str) -> str:
    """Name in the zoo of the whole model published for a config.

    Args:
        config: Its file, ``mmvssm::NAME.py``, or a name of the zoo.

    Raises:
        UsageError: There is none.
    """
    name = Path(config.split('::')[-1]).stem
    row = zoo.TABLE.get(config) or zoo.of_config(name)
    if row is None or row.url is None:
        raise UsageError(
            f'no weights were published for {name}: give a checkpoint. `python -m '
            'mmvssm.zoo list` shows what was.'
        )
    return f'{zoo.SCHEME}{row.name}'


class CheckedPretrainedInit(PretrainedInit):
    """``init_cfg=dict(type='Pretrained')`` that says what it loaded, or fails.

    Args:
        checkpoint, prefix, map_location: Of mmengine's. A name of the zoo and
            ``hf://`` are taken, too.
        weights: ``'raw'`` or ``'ema'``, of a file with both.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        map_location: Any = 'cpu',
        weights: str | None = None,
    ):
        super().__init__(checkpoint, prefix, map_location)
        self.weights = weights

    def __call__(self, module: nn.Module) -> None:
        """Load, and log the report.

        Raises:
            CheckpointError: The file cannot be read or is of another model.
        """
        report = load_part(module, self.checkpoint, self.prefix, self.weights)
        print_log(str(report), 'current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())


def load_part(
    module: nn.Module,
    source: str,
    prefix: str | None = None,
    weights: str | None = None,
) -> object:
    """Load a whole model, a backbone, or a neck or head alone.

    Args:
        module: What to fill.
        source: A file, an address or a name of the zoo.
        prefix: What precedes the names of the module in the file, such as ``'neck.'``.
        weights: ``'raw'`` or ``'ema'``, of a file with both.

    Returns:
        A report to print.

    Raises:
        CheckpointError: The file cannot be read, or does not have what the module
            needs; it is then unchanged.
    """
    target = module.state_dict()
    content = _read_elsewhere(source)
    try:
        recognise(target, 'the model', prefix)
    except CheckpointError:
        state = read_converted(content, weights)
        return _load_other(module, target, state, source, prefix)
    return load_checkpoint(
        module, content, prefix=prefix, weights=weights, other_heads=True
    )


def _load_other(
    module: nn.Module,
    target: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    prefix: str | None,
) -> str:
    """Load a module without a backbone of a family."""
    kind = type(module).__name__
    # A dot at the end may be left out, as mmengine allows.
    start = f'{prefix.removesuffix(".")}.' if prefix else ''
    given = {
        key.removeprefix(start): value
        for key, value in state.items()
        if key.startswith(start)
    }
    fresh, notes = fresh_heads(given, target, str(source), strict=False)
    bad = [
        key
        for key, value in target.items()
        if key not in fresh and (key not in given or not fits(given[key], value))
    ]
    if bad:
        heads = sorted({key.split('.')[0] for key in state})
        raise CheckpointError(
            f'{source} does not have the weights of this {kind}'
            + (f' behind {start!r}' if start else '')
            + f': {len(target) - len(bad)} of {len(target)} tensors match, the first '
            f'misfit is {bad[0]} {tuple(target[bad[0]].shape)}. The names in the file '
            f'start with {", ".join(heads[:8])}: set prefix= of init_cfg to the part '
            'to take'
        )
    loaded = {key: given[key] for key in target if key not in fresh}
    module.load_state_dict(loaded, strict=False)
    lines = [f'loaded {len(loaded)} of {len(target)} tensors of {kind} from {source}']
    return '\n  '.join([*lines, *notes])


def _read_elsewhere(source: str) -> str | Mapping:
    """What mmengine reads, where only it knows the address, such as ``s3://``."""
    if '://' not in source or zoo.is_address(source):
        return source
    return CheckpointLoader.load_checkpoint(source, 'cpu', 'current')


def read_converted(
    source: str | Mapping, weights: str | None = None
) -> dict[str, Tensor]:
    """Read weights under the names of this package, if they are of its families."""
    try:
        return convert(source, weights=weights).state_dict()
    except CheckpointError:
        # Another family's, or no file at all: then this fails, too.
        return read_state_dict(source, weights)


# Entries of configs


def _parts(node: Any) -> Iterator[ConfigDict]:
    """All dicts of a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
        node = [value for key, value in node.items() if key != 'init_cfg']
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        yield from _parts(child)


def _entries(part: Mapping) -> list[dict]:
    given = part.get('init_cfg') or []
    return [given] if isinstance(given, dict) else list(given)


def _is_pretrained(entry: Mapping) -> bool:
    return entry.get('type') in ('Pretrained', PretrainedInit, CheckedPretrainedInit)


def _pretrained(part: Mapping) -> list[dict]:
    return [entry for entry in _entries(part) if _is_pretrained(entry)]


def pretrained_entries(model: ConfigDict) -> list[dict]:
    """All entries of a model's config that load weights."""
    return [entry for part in _parts(model) for entry in _pretrained(part)]


def _drop_pretrained(part: ConfigDict) -> None:
    if _pretrained(part):
        part.init_cfg = [e for e in _entries(part) if not _is_pretrained(e)] or None


def _add_pretrained(part: ConfigDict, source: str) -> None:
    entry = dict(type='Pretrained', checkpoint=source)
    others = _entries(part)
    part.init_cfg = [*others, entry] if others else entry


def _adopt_pretrained(model: ConfigDict, whole_model: bool = False) -> None:
    """Turn ``pretrained=`` into an ``init_cfg``.

    A model of mmseg 0.x fills its backbone with these weights, one of MMPretrain all of
    itself.
    """
    if whole_model and (source := model.pop('pretrained', None)) is not None:
        if _pretrained(model):
            raise UsageError(
                f'pretrained={source} and init_cfg of the model both name its weights: '
                'leave one of the two out.'
            )
        _add_pretrained(model, source)
    named = [
        source
        for part in (model, model.backbone)
        if (source := part.pop('pretrained', None)) is not None
    ]
    if not named:
        return
    if len(set(named)) > 1 or _pretrained(model.backbone):
        raise UsageError(
            f'pretrained={named[0]} is not all that names weights of the backbone: '
            'leave out the other pretrained=, or set init_cfg=None of the backbone.'
        )
    _add_pretrained(model.backbone, named[0])


# Files


def _goes_on(cfg: Config) -> bool:
    """Whether ``--resume auto`` finds something, so that no other weights matter."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    safe = str(hook.get('type')).endswith('SafeCheckpointHook')
    folder = cfg.get('work_dir') or ''
    return safe and not hook.get('out_dir') and has_checkpoints(folder)


def _is_here(source: str) -> bool:
    if not zoo.is_address(source):
        return '://' in source or Path(source).is_file()
    return zoo.path_of(source).is_file()


def _absent(sources: list[str]) -> str:
    lines = []
    for source in sources:
        if zoo.is_address(source):
            lines += [f'    {source}, which goes to', f'    {zoo.path_of(source)}']
        else:
            lines.append(f'    {Path(source).absolute()}')
    return '\n'.join(
        [
            'Nor are the weights here that the training starts from:',
            *lines,
            'Names and addresses are downloaded once the data are found, or now',
            'by `python -m mmvssm.zoo fetch NAME`. Without weights: --from-scratch.',
        ]
    )
