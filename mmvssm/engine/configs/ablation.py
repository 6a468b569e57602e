"""Train the rows of an ablation: one config a row, the rest the same for all."""

import json
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmvssm.engine.checkpoints.start import announce_start, choose_start
from mmvssm.engine.errors import UsageError
from mmvssm.engine.labels.check import check_labels
from mmvssm.engine.launching.work_dir import lock_work_dir
from mmvssm.engine.runner import build_runner
from mmvssm.families import families

from .config import enable_resume, is_classifier, load_config
from .data import check_datasets, leaves
from .explain import explain
from .options import merge_options

_HEADS = ('decode_head', 'auxiliary_head', 'head')
# Side of the images on which the papers' classifiers are trained.
_IMAGE = 224
# What belongs to one row, or to one start of the tool.
_OWN = ('ablation', 'randomness', 'work_dir', 'resume', 'load_from', 'experiment_name')


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: The name of its config without ``.py``.
        label: What a table calls it.
        config: The config.
        paper: What the paper has for it, as it prints it, of ``params``
            (millions), ``flops`` (10^9) and ``top1`` (per cent); None if there
            is no such row.
    """

    name: str
    label: str
    config: Path
    paper: dict[str, str] | None


def load_rows(folder: str | Path) -> list[Row]:
    """Find the rows in a folder of configs, in the order of the table.

    A row is a config with ``ablation = dict(order=..., row=LABEL, paper=...)``.

    Raises:
        UsageError: There is none.
    """
    found = []
    for path in sorted(Path(folder).glob('*.py')):
        about = load_config(str(path)).get('ablation')
        if about is not None:
            row = Row(path.stem, about.row, path, about.paper)
            found.append((about.order, row))
    if not found:
        raise UsageError(f'no config in {Path(folder).absolute()} is a row.')
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def select_rows(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """Some of the rows, in their order; without names all of them.

    Raises:
        UsageError: A name is unknown.
    """
    unknown = sorted(set(names or ()) - {row.name for row in rows})
    if unknown:
        raise UsageError(
            f'no row {", ".join(unknown)}; there are '
            f'{", ".join(row.name for row in rows)}.'
        )
    return [row for row in rows if not names or row.name in names]


def row_config(
    row: Row, data: str | None = None, options: Sequence[str] | None = None
) -> Config:
    """The config of a row, moved to a data set.

    Args:
        row: The row.
        data: A config with the data set and whatever else is to be the same
            for all rows: a file of ``configs/_base_/datasets``, a whole
            experiment, or one like ``configs/_base_/ablation_quickstart.py``.
            Its entries take the place of the row's; only its ``model`` is
            merged into the row's, without the backbone. If it is a classifier and
            the row a segmentor, the row becomes that classifier with its own
            backbone. A row that is a classifier keeps its type and head, and the rest
            of its model only if the config has no ``model``. Of the list
            ``backbones`` the row gets the arguments of the entry that has the type of
            the row's backbone. By default nothing moves.
        options: ``'key.subkey=value'`` strings, which come last.

    Returns:
        The config. Its heads take the channels of the backbone, and have one
        output for each class of the data set if its config or type names them.

    Raises:
        UsageError: A config cannot be read, or the parts do not fit together.
    """
    cfg = load_config(str(row.config))
    if data is not None:
        cfg = _move_to_data(cfg, data)
    if options:
        merge_options(cfg, options, str(row.config))
    _fit_heads(cfg, row.name)
    return cfg


def _move_to_data(cfg: Config, path: str) -> Config:
    given = load_config(path, required=('train_dataloader',))
    classify = is_classifier(given) and not is_classifier(cfg)
    data = given.to_dict()
    model = data.pop('model', {})
    # A row that is a classifier may be about its head; how it is trained, with mixed
    # images for example, is the data's.
    own = ('type', 'backbone', 'head') if is_classifier(cfg) else ('backbone',)
    if model and is_classifier(cfg):
        cfg.model = {key: cfg.model[key] for key in own}
    for part in own:
        model.pop(part, None)
    kind = cfg.model.backbone.type
    if classify:
        model['backbone'] = _arguments_in_classifier(kind)
    for small in data.pop('backbones', ()):
        if small.pop('type') == kind:
            model['backbone'] = {**model.get('backbone', {}), **small}
    if classify:
        backbone = cfg.model.backbone
        cfg = Config(dict(ablation=cfg.ablation, model=dict(backbone=backbone)))
    for key in set(data) - {'ablation', 'work_dir'}:
        cfg[key] = data[key]
    try:
        cfg.merge_from_dict(dict(model=model))
    except (KeyError, TypeError) as error:
        raise UsageError(
            f'the model of {path} does not fit the rows: {error}'
        ) from None
    return cfg


def _arguments_in_classifier(kind: str) -> dict[str, Any]:
    """Arguments of a backbone of this type that a segmentor gives otherwise."""
    found = (f for f in families() if f.backbone is MODELS.get(kind))
    arguments = next((f.classifier_args for f in found), {})
    return dict(img_size=_IMAGE, **arguments)


def _fit_heads(cfg: Config, name: str) -> None:
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    try:
        with torch.device('meta'):
            channels = MODELS.build(cfg.model.backbone).out_channels
    except (TypeError, ValueError) as error:
        said = explain(error, cfg) or error
        raise UsageError(f'the backbone of row {name}: {said}') from error
    classes = _number_of_classes(cfg.train_dataloader.dataset)
    for key in _HEADS:
        head = cfg.model.get(key)
        if head:
            index = head.get('in_index', -1)
            several = isinstance(index, Sequence)
            head.in_channels = (
                [channels[i] for i in index] if several else channels[index]
            )
            head.num_classes = classes or head.num_classes
    for part in (cfg, cfg.model):
        if classes and 'num_classes' in (part.get('data_preprocessor') or {}):
            part.data_preprocessor.num_classes = classes


def _number_of_classes(dataset: dict) -> int | None:
    inner = next(leaves(dataset))
    names = (inner.get('metainfo') or {}).get('classes')
    if names is None:
        names = getattr(DATASETS.get(inner['type']), 'METAINFO', {}).get('classes')
    return len(names) if names else None


def claim_work_dir(work_dir: str | Path, cfg: Config) -> None:
    """Make a folder for results that are to be compared with each other.

    It notes what all rows have in common, and refuses another start with other
    settings.

    Args:
        work_dir: The folder.
        cfg: The config of any row.

    Raises:
        UsageError: The folder has results of other settings.
    """
    settings = {key: cfg[key] for key in sorted(set(cfg) - set(_OWN))}
    settings = _plain(settings)
    settings['model'].pop('backbone')
    for key in _HEADS:
        (settings['model'].get(key) or {}).pop('in_channels', None)
    path = Path(work_dir) / 'settings.json'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
        return
    before = json.loads(path.read_text())
    changed = sorted(
        key
        for key in set(before) | set(settings)
        if before.get(key) != settings.get(key)
    )
    if changed:
        raise UsageError(
            f'{path.parent} has results of other settings ({", ".join(changed)}), '
            'which cannot be compared with these. Take another --work-dir, or delete '
            'that folder.'
        )


def _plain(value: Any) -> Any:
    """What ``value`` is after a way through JSON."""
    return json.loads(json.dumps(value, default=str))


def usual_metric(cfg: Config) -> str:
    """The metric that papers compare: top-1 accuracy of a classifier, or mIoU."""
    return 'accuracy/top1' if is_classifier(cfg) else 'mIoU'


def train_row(
    row: Row,
    cfg: Config,
    seed: int,
    work_dir: str | Path,
    metric: str | None = None,
) -> dict:
    """Train and test a row, or go on where it was interrupted.

    Args:
        row: The row.
        cfg: Its config, of :func:`row_config`.
        seed: Of weights and order of the data.
        work_dir: The results are in ``work_dir/<row>/seed_<seed>``.
        metric: Which of the metrics counts, by default :func:`usual_metric`.

    Returns:
        The result, which is also in ``result.json`` there: row, seed, metric,
        its value, all metrics, mean seconds of an iteration of the last start,
        backbone. If the file is there, nothing is done.

    Raises:
        UsageError: The data is not there, the row was begun with another
            model, or there is no such metric.
    """
    folder = Path(work_dir) / row.name / f'seed_{seed}'
    model = _plain(cfg.model)
    begun, result = folder / 'model.json', folder / 'result.json'
    if begun.exists() and json.loads(begun.read_text()) != model:
        raise UsageError(
            f'{folder} was begun with another model. Delete it, or take another '
            '--work-dir.'
        )
    if result.exists():
        return json.loads(result.read_text())
    check_datasets(cfg, splits=('train', 'test'))
    metric = metric or usual_metric(cfg)
    cfg = deepcopy(cfg)
    cfg.work_dir = str(folder)
    cfg.randomness = dict(seed=seed)
    weights = choose_start(cfg, resume='auto')
    enable_resume(cfg)
    # Runners that share a name would share their logs.
    cfg.experiment_name = f'{row.name}_{seed}_{time.time_ns()}'
    with lock_work_dir(cfg):
        begun.write_text(json.dumps(model))
        runner = build_runner(cfg)
        announce_start(cfg, weights)
        check_labels(cfg, splits=('train', 'test'))
        runner.train()
        metrics = runner.test()
        if metric not in metrics:
            raise UsageError(f'no metric {metric}; there are {", ".join(metrics)}.')
        times = runner.message_hub.log_scalars.get('train/time')
        found = dict(
            row=row.name,
            seed=seed,
            metric=metric,
            value=float(metrics[metric]),
            metrics={key: float(value) for key, value in metrics.items()},
            seconds_per_iteration=None if times is None else float(times.mean()),
            backbone=model['backbone'],
        )
        # All of it or nothing: the file says that the row is finished.
        unfinished = result.with_suffix('.tmp')
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(result)
        return found


def finished(rows: Sequence[Row], work_dir: str | Path) -> Iterator[dict]:
    """Results that are in a folder, in the order of rows and seeds."""
    for row in rows:
        results = (Path(work_dir) / row.name).glob('seed_*/result.json')
        yield from sorted(
            (json.loads(path.read_text()) for path in results),
            key=lambda result: result['seed'],
        )
