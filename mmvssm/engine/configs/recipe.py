"""What a config will do, read off the objects that mmengine makes of it."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import ceil
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import _ParamScheduler
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import distributed, nn
from torch.utils.data import DataLoader

from mmvssm.engine.checkpoints.start import pretrained_entries
from mmvssm.engine.errors import UsageError
from mmvssm.engine.training.epoch_loop import resume_within_epochs

from .data import check_folders, leaves

# Images of the published data sets, and the entry of their configs that is like in no
# other. COCO's are without those that have no objects.
_PUBLISHED = {
    'ImageNet': (1281167, 'split', 'train'),
    'CocoDataset': (117266, 'ann_file', 'annotations/instances_train2017.json'),
    'ADE20KDataset': (20210, 'data_prefix', dict(img_path='images/training')),
}
# Entries of a group of parameters that are not settings of the optimizer.
_NO_SETTINGS = ('params', 'param_names', 'group_name', 'lr_scale')
# Of rates, in a table.
_COLUMNS = 4
_PRECISIONS = {'mmvssm.Bf16OptimWrapper': 'bfloat16', 'AmpOptimWrapper': 'float16'}


def read_recipe(
    cfg: Config,
    at: Sequence[int] | None = None,
    world_size: int | None = None,
    images: int | None = None,
) -> dict[str, Any]:
    """Find out what a training will do, without data, weights or a GPU.

    Model, optimizer, loop and schedulers are built from the config as mmengine builds
    them, the model without memory for its weights; then the schedulers are run through
    the training.

    Args:
        cfg: Of :func:`mmvssm.engine.load_config`, with all that a training needs.
        at: Iterations, counted from 0, at which to look at rates. By default the first
            two, those at which a scheduler begins, ends its warm-up or ends, each with
            the one after it, the middle and the last.
        world_size: Number of processes; by default that of ``auto_scale_lr``'s
            ``base_batch_size``, if the config has it, or 1.
        images: Number of images to train on; by default those that are found, or those
            of the published data set.

    Returns:
        A dict for JSON: ``model``, ``batch``, ``base_batch`` (that the config's rates
        are for, where it says so), ``images``, ``length``, ``optimizer``,
        ``precision``, ``clip_grad``, ``averages`` (copies of the weights), ``groups``
        (of parameters), ``schedule`` (rates and decay of each group at each iteration),
        ``augmentations`` (of images, of batches) and ``start``.

    Raises:
        UsageError: The number of images is not known and needed, or an iteration is
            none of this training.
    """
    for name, value in (('world_size', world_size), ('images', images)):
        if value is not None and value < 1:
            raise UsageError(f'{name} must be 1 or more, not {value}.')
    cfg = deepcopy(cfg)
    resume_within_epochs(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    counts = cfg.optim_wrapper.get('accumulative_counts', 1)
    per_process = cfg.train_dataloader.get('batch_size', 1)
    world_size = world_size or _usual_world_size(cfg, per_process * counts)
    total = per_process * world_size * counts
    number, source = _count_images(cfg, images)
    with _quietly(), _world(world_size), _explained():
        model = _build_model(cfg)
        runner = _Plan(cfg, model, world_size, number or total)
        if runner.batches == 0:
            raise UsageError(
                f'{number} images do not fill one batch of {per_process} images for '
                f'each of {world_size} processes.'
            )
        groups = _groups(runner, model)
        length = _length(runner)
        schedule = _schedule(runner, groups, at)
        hooks = _averages(cfg, total)
    return dict(
        model=_describe_model(cfg, model),
        batch=dict(
            per_process=per_process,
            processes=world_size,
            added_up=counts,
            total=total,
        ),
        base_batch=_base_batch(cfg),
        images=dict(number=number, source=source),
        length=length,
        optimizer=_describe_optimizer(runner),
        precision=_precision(cfg),
        clip_grad=dict(runner.optim_wrapper.clip_grad_kwargs or {}) or None,
        averages=[*hooks, *_taught(model)],
        groups=groups,
        schedule=schedule,
        augmentations=dict(images=_pipelines(cfg), batches=_batch_augments(model)),
        start=_start(cfg),
    )


def format_recipe(recipe: Mapping[str, Any]) -> str:
    """What :func:`read_recipe` found, as text."""
    batch, length, images = (recipe[key] for key in ('batch', 'length', 'images'))
    source = images['source']
    size = f'{batch["processes"]} processes x {batch["per_process"]} images'
    if batch['added_up'] > 1:
        size += f' x {batch["added_up"]} batches added up'
    size += f' = {batch["total"]}'
    if recipe['base_batch'] not in (None, batch['total']):
        size += f'; the config is for {recipe["base_batch"]}'
    time = f'{length["iterations"]} iterations'
    if length['epochs']:
        of = f'{length["epochs"]} epochs of {length["iterations_per_epoch"]} iterations'
        time = f'{of}, {time}'
    model, optimizer = recipe['model'], dict(recipe['optimizer'])
    arch = model['arch'] if isinstance(model['arch'], str) else 'an arch of its own'
    weights = f'{model["parameters"] / 1e6:.2f} M parameters'
    drop = f'drop path {model["drop_path_rate"]}'
    clip = recipe['clip_grad']
    parts = {
        'model': f'{model["type"]}, {model["backbone"]} {arch}, {drop}, {weights}',
        'starts from': ', '.join(recipe['start']) or 'random weights',
        'batch': size,
        'images': f'{images["number"]} ({source})' if images['number'] else source,
        'length': time,
        'optimizer': describe_part(optimizer),
        'precision': recipe['precision'],
        'clipping': describe_part(dict(type='gradients', **clip)) if clip else 'none',
        'averages': '; '.join(map(describe_part, recipe['averages'])) or 'none',
    }
    lines = [f'{name:<12} {text}' for name, text in parts.items()]
    lines += ['', 'Parameters', *_group_table(recipe['groups'])]
    lines += ['', 'Rates', *_rate_table(recipe['groups'], recipe['schedule'])]
    for kind in ('images', 'batches'):
        steps = recipe['augmentations'][kind]
        numbered = [f'  {i}. {step}' for i, step in enumerate(steps, 1)]
        lines += ['', f'Augmentation of {kind}', *(numbered or ['  none'])]
    return '\n'.join(lines)


def _group_table(groups: Sequence[Mapping]) -> Iterator[str]:
    yield '  group   lr x      decay     tensors  weights     such as'
    for number, group in enumerate(groups):
        yield (
            f'  {number:<8}{group["lr_mult"]:<10.5g}{_short(group["weight_decay"]):<10}'
            f'{group["tensors"]:<9}{group["weights"]:<12}{group["names"][0]}'
        )


def _rate_table(groups: Sequence[Mapping], schedule: Sequence[Mapping]) -> Iterator:
    """Rates of the first group with each factor, of many the highest and the lowest."""
    mults = [group['lr_mult'] for group in groups]
    several = sorted(set(mults), reverse=True)
    if len(several) > _COLUMNS:
        several = several[: _COLUMNS - 1] + several[-1:]
    shown = {mult: mults.index(mult) for mult in several}
    decays = [group['weight_decay'] or 0 for group in groups]
    decayed = decays.index(max(decays))
    heads = [f'lr x {mult:.5g}' for mult in shown]
    columns = ''.join(f'{head:<16}' for head in heads)
    yield f'  iteration  epoch  decay     {columns}'.rstrip()
    for row in schedule:
        epoch = '-' if row['epoch'] is None else row['epoch']
        rates = ''.join(f'{row["lr"][index]:<16.10g}' for index in shown.values())
        decay = _short(row['weight_decay'][decayed])
        yield f'  {row["iteration"]:<11}{epoch:<7}{decay:<10}{rates}'.rstrip()


class _Plan(Runner):
    """mmengine's runner, as far as it builds what a training is made of.

    Args:
        cfg: The config.
        model: The model.
        world_size: Number of processes.
        number: Number of images.
    """

    def __init__(self, cfg: Config, model: nn.Module, world_size: int, number: int):
        self.cfg, self.model, self.logger = cfg, model, MMLogger.get_current_instance()
        self._world_size, self._rank = world_size, 0
        self.param_schedulers: Any = None
        loader = dict(cfg.train_dataloader, dataset=_Images(number), num_workers=0)
        for key in ('persistent_workers', 'prefetch_factor'):
            loader.pop(key, None)
        self._train_dataloader: Any = self.build_dataloader(loader, seed=0)
        self._train_loop: Any = self.build_train_loop(cfg.train_cfg)
        self.optim_wrapper = self.build_optim_wrapper(_plain_wrapper(cfg))
        self.scale_lr(self.optim_wrapper, cfg.get('auto_scale_lr'))

    @property
    def train_dataloader(self) -> DataLoader:
        """That of images which are only counted."""
        return self._train_dataloader

    @property
    def batches(self) -> int | None:
        """Batches of an epoch, None if the loop knows of none."""
        by_epoch = isinstance(self._train_loop, EpochBasedTrainLoop)
        return len(self.train_dataloader) if by_epoch else None


class _Images(torch.utils.data.Dataset):
    """Images that are only counted."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        return index


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a line for each parameter, and without advice on when to step."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained() -> Iterator[None]:
    """What a part says of its arguments is the config's fault."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f'the config cannot be carried out: {error}.') from error


@contextmanager
def _world(size: int) -> Iterator[None]:
    """Be rank 0 of so many processes, of which the others need not exist."""
    if size == 1 or distributed.is_initialized():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group('fake', rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _base_batch(cfg: Config) -> int | None:
    return (cfg.get('auto_scale_lr') or {}).get('base_batch_size')


def _usual_world_size(cfg: Config, batch: int) -> int:
    base = _base_batch(cfg)
    return base // batch if base and base % batch == 0 else 1


def _count_images(cfg: Config, images: int | None) -> tuple[int | None, str]:
    if images:
        return images, 'given'
    dataset = cfg.train_dataloader.dataset
    try:
        check_folders(cfg, ('train',))
        return len(DATASETS.build(deepcopy(dataset))), 'found'
    except (UsageError, OSError):
        inner = list(leaves(dataset))
    if len(inner) == 1 and (number := _published_number(inner[0])):
        return number, f'published for {inner[0]["type"]}'
    if cfg.train_cfg.get('type') == 'IterBasedTrainLoop':
        return None, 'not known'
    raise UsageError(
        'the images to train on are not here, and an epoch is as long as there are '
        'images: say how many with --images N.'
    )


def _published_number(dataset: Mapping[str, Any]) -> int | None:
    kind = str(dataset.get('type')).rpartition('.')[2]
    number, key, value = _PUBLISHED.get(kind, (None, '', None))
    given = dataset.get(key)
    if isinstance(value, dict):
        given = {name: (given or {}).get(name) for name in value}
    return number if given == value and not dataset.get('metainfo') else None


def _build_model(cfg: Config) -> nn.Module:
    model = deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    try:
        with torch.device('meta'):
            return MODELS.build(deepcopy(model))
    except (NotImplementedError, RuntimeError):
        return MODELS.build(model)  # Something computes with its values.


def _plain_wrapper(cfg: Config) -> dict:
    """Without mixed precision, whose wrapper mmengine makes on a GPU alone."""
    wrapper = deepcopy(cfg.optim_wrapper)
    if wrapper.get('type') in _PRECISIONS:
        wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            wrapper.pop(key, None)
    return wrapper


def _precision(cfg: Config) -> str:
    wrapper = cfg.optim_wrapper
    default = _PRECISIONS.get(wrapper.get('type'), 'float32')
    return wrapper.get('dtype') or default


# Parameters and rates


def _groups(runner: _Plan, model: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters with equal settings; the optimizer keeps one of each."""
    names = {id(value): name for name, value in model.named_parameters()}
    optimizer = runner.optim_wrapper.optimizer
    base = optimizer.defaults.get('lr')
    found: dict[str, dict[str, Any]] = {}
    kept = {}
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k not in _NO_SETTINGS}
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        if key not in found:
            kept[key] = group
            found[key] = dict(
                lr_mult=group['lr'] / base if base else 1.0,
                weight_decay=group.get('weight_decay'),
                tensors=0,
                weights=0,
                names=[],
            )
        entry = found[key]
        entry['tensors'] += len(group['params'])
        entry['weights'] += sum(value.numel() for value in group['params'])
        entry['names'] += [names[id(value)] for value in group['params']]
    optimizer.param_groups[:] = kept.values()
    return list(found.values())


def _describe_optimizer(runner: _Plan) -> dict[str, Any]:
    optimizer = runner.optim_wrapper.optimizer
    # What is off or left to torch goes without saying.
    settings = {
        key: value
        for key, value in optimizer.defaults.items()
        if value is not None and not isinstance(value, bool)
    }
    return dict(type=type(optimizer).__name__, **settings)


def _length(runner: _Plan) -> dict[str, int | None]:
    loop = runner._train_loop
    return dict(
        epochs=loop.max_epochs if runner.batches else None,
        iterations_per_epoch=runner.batches,
        iterations=loop.max_iters,
    )


def _schedule(
    runner: _Plan, groups: list[dict], at: Sequence[int] | None
) -> list[dict[str, Any]]:
    schedulers = []
    if runner.cfg.get('param_scheduler'):
        schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
    if isinstance(schedulers, Mapping):
        schedulers = [one for several in schedulers.values() for one in several]
    last = runner._train_loop.max_iters - 1
    wanted = at or _turns(schedulers, runner.batches, last)
    wrong = [iteration for iteration in wanted if not 0 <= iteration <= last]
    if wrong:
        raise UsageError(
            f'--at {" ".join(map(str, wrong))}: this training has the iterations 0 to '
            f'{last}.'
        )
    optimizer, found = runner.optim_wrapper.optimizer, []
    for iteration in _run(schedulers, sorted(set(wanted)), runner.batches):
        found.append(
            dict(
                iteration=iteration,
                epoch=iteration // runner.batches if runner.batches else None,
                lr=[group['lr'] for group in optimizer.param_groups],
                weight_decay=[g.get('weight_decay') for g in optimizer.param_groups],
            )
        )
    return found


def _turns(
    schedulers: Iterable[_ParamScheduler], batches: int | None, last: int
) -> list[int]:
    """Iterations at which something may change, and those right behind them."""
    found = {0, 1, (last + 1) // 2, last}
    for one in schedulers:
        unit = (batches or last + 1) if one.by_epoch else 1
        lag = getattr(one, 'lag', 0)
        warm = one.begin + getattr(one, 'warmup', 0) + lag
        for step in (one.begin, one.end, warm, *getattr(one, 'milestones', ())):
            found |= {step * unit, (step + 1) * unit if one.by_epoch else step + 1}
    return [iteration for iteration in found if 0 <= iteration <= last]


def _run(
    schedulers: Sequence[_ParamScheduler], wanted: Sequence[int], batches: int | None
) -> Iterator[int]:
    """Step the schedulers as mmengine's hook does, and stop where it is wanted."""
    by_iteration = [one for one in schedulers if not one.by_epoch]
    by_epoch = [one for one in schedulers if one.by_epoch]
    done = 0
    for target in wanted:
        while done < target:
            ends = ceil((done + 1) / batches) * batches if batches else target
            done = done + 1 if by_iteration else min(ends, target)
            for one in by_iteration:
                one.step()
            if done == ends and batches:
                for one in by_epoch:
                    one.step()
        yield target


# Other parts


def _averages(cfg: Config, batch: int) -> list[dict[str, Any]]:
    """Copies of the weights that hooks keep."""
    found = []
    given = [*(cfg.get('custom_hooks') or []), *cfg.get('default_hooks', {}).values()]
    for options in given:
        if not str((options or {}).get('type')).endswith('EMAHook'):
            continue
        hook: Any = HOOKS.build(deepcopy(options))
        if hasattr(hook, 'decay_with'):
            decay, evaluated = hook.decay_with(batch), hook.evaluate
        else:
            decay = 1 - hook.ema_cfg.get('momentum', 0.0002)
            evaluated = 'average' if getattr(hook, 'evaluate_on_ema', True) else 'raw'
        found.append(dict(type=options['type'], decay=decay, evaluated=evaluated))
    return found


def _taught(model: nn.Module) -> list[dict[str, Any]]:
    """A model that learns from the average of its weights."""
    if not hasattr(model, 'teach'):
        return []
    return [dict(type=type(model).__name__, begin=model.begin, ratio=model.ratio)]


def _describe_model(cfg: Config, model: nn.Module) -> dict[str, Any]:
    backbone = cfg.model.get('backbone') or {}
    arch = backbone.get('arch')
    return dict(
        type=type(model).__name__,
        backbone=backbone.get('type'),
        arch=arch if arch is None or isinstance(arch, str) else dict(arch),
        drop_path_rate=backbone.get('drop_path_rate'),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _pipelines(cfg: Config) -> list[str]:
    """The transforms of an image, those within a wrapper first."""
    found: list[str] = []
    dataset = cfg.train_dataloader.dataset
    while isinstance(dataset, dict):
        found = [describe_part(part) for part in dataset.get('pipeline') or []] + found
        several = dataset.get('datasets') or [None]
        dataset = dataset.get('dataset') or several[0]
    return found


def describe_part(part: Mapping[str, Any]) -> str:
    """A part of a config in one line, such as ``RandomFlip(prob=0.5)``."""
    options = ', '.join(
        f'{key}={_short(value)}' for key, value in part.items() if key != 'type'
    )
    return f'{part.get("type")}({options})'


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return describe_part(value) if 'type' in value else repr(dict(value))
    if isinstance(value, (list, tuple)):
        return f'[{", ".join(map(_short, value))}]'
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def _batch_augments(model: nn.Module) -> list[str]:
    """What the data preprocessor does to whole batches in training."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    own = [
        f'{key}({value:g})'
        for key in ('erase', 'mixup', 'cutmix')
        if (value := getattr(preprocessor, key, 0))
    ]
    augments = getattr(preprocessor, 'batch_augments', None)
    if own or not augments:
        return own
    several = getattr(augments, 'augments', augments)
    return [type(one).__name__ for one in several if one is not None]


def _start(cfg: Config) -> list[str]:
    named = [entry['checkpoint'] for entry in pretrained_entries(cfg.model)]
    whole = cfg.get('load_from')
    return [whole] if whole else named
