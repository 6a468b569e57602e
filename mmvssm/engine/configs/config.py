"""Read a config for a tool, and switch on what its flags ask for."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import MODELS

from mmvssm import zoo
from mmvssm.compat import why_no_classification, why_no_detection
from mmvssm.engine.errors import UsageError
from mmvssm.engine.labels.metric import count_nan_classes

from .explain import TOOLBOXES, did_you_mean, is_scope, near
from .images import check_channels, check_readers, explain_small_images
from .options import merge_options

# Entries that the tools look into, and what they must be where they are given.
_DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
_DICTS = (
    *('model', 'model.backbone', 'optim_wrapper', 'default_hooks', 'env_cfg'),
    *('default_hooks.visualization', 'env_cfg.dist_cfg', 'visualizer', 'tta_model'),
    *_DATALOADERS,
    *(f'{loader}.dataset' for loader in _DATALOADERS),
)
_LISTS_OR_DICTS = ('val_evaluator', 'test_evaluator')
_LISTS = ('custom_hooks', 'tta_pipeline')
# In their place comes one that reads images as the test does.
_VISUALIZATION_HOOKS = (
    'SegVisualizationHook',
    'DetVisualizationHook',
    'VisualizationHook',
)
_STRINGS = ('work_dir', 'default_scope', 'load_from', 'model.type')


def load_config(
    path: str,
    options: Sequence[str] | None = None,
    work_dir: str | None = None,
    required: Iterable[str] = ('model',),
) -> Config:
    """Read a config file as every tool does.

    Args:
        path: A file, ``'package::name.py'`` for a config that an installed package
            ships, or a name of the zoo for the config of these weights.
        options: ``'key.subkey=value'`` strings of ``--cfg-options``.
        work_dir: Where results go. Without it the config's own ``work_dir``
            holds, and without that ``./work_dirs/<name of the config>``.
        required: Top-level keys the tool cannot do without.

    Raises:
        UsageError: No such file, a file that is not a config, a key that is
            missing, an option that does not fit, a default scope that is none, parts
            that are for different numbers of image channels, or images, a detector or a
            classifier that need what is not installed.
    """
    path = _config_of(path)
    cfg = _read(path)
    if options:
        merge_options(cfg, options, path)
    _check_types(cfg, path)
    if is_classifier(cfg) and (reason := why_no_classification()):
        raise UsageError(
            f'{path} is a classifier of MMPretrain, and there is {reason}: run `make '
            'install-vision`, or install onedl-mmpretrain and a torchvision that fits '
            'your torch.'
        )
    _check_scope(cfg, path)
    missing = [key for key in required if cfg.get(key) is None]
    if missing:
        raise UsageError(
            f'{path} has no {", ".join(missing)}: it is not a whole '
            'experiment. Give a file such as configs/upernet_vmamba_t.py, '
            'not a part of one.'
        )
    if is_detector(cfg) and (reason := why_no_detection()):
        raise UsageError(
            f'{path} is a detector, and there is {reason}: run `make install-det`, or '
            'install onedl-mmdetection and onedl-mmcv (not mmcv-lite).'
        )
    _move_preprocessor(cfg)
    if is_classifier(cfg):
        _check_classifier(cfg, path)
    name = Path(path.split('::')[-1]).stem
    cfg.work_dir = work_dir or cfg.get('work_dir') or f'./work_dirs/{name}'
    check_channels(cfg, path)
    check_readers(cfg, path)
    explain_small_images(cfg)
    count_nan_classes(cfg)
    leave_out_logits(cfg)
    return cfg


def leave_out_logits(cfg: Config) -> None:
    """Let a segmentor be tested by its labels alone, see :class:`LabelsOnlyHook`.

    Args:
        cfg: Changed in place.
    """
    hook, hooks = dict(type='mmvssm.LabelsOnlyHook'), cfg.get('custom_hooks') or []
    if not (is_detector(cfg) or is_classifier(cfg) or hook in hooks):
        cfg.custom_hooks = [*hooks, hook]


def _move_preprocessor(cfg: Config) -> None:
    """Put the preprocessor beside the model into it, as mmengine's runner does."""
    settings, model = cfg.get('data_preprocessor'), cfg.get('model')
    if settings is not None and model is not None:
        model.setdefault('data_preprocessor', settings)


def _check_classifier(cfg: Config, path: str) -> None:
    """Refuse what trains and is not what it looks like."""
    model = cfg.get('model') or {}
    backbone, head = model.get('backbone') or {}, model.get('head') or {}
    if not isinstance(head, dict):
        return
    pooled = head.get('type') == 'mmvssm.PooledClsHead'
    # Other backbones need not have such an option.
    has_norms = backbone.get('type') in ('mmvssm.VSSM', 'mmvssm.MLLA')
    if pooled and has_norms and backbone.get('out_norm', True):
        raise UsageError(
            f'{path}: mmvssm.PooledClsHead has the norm of the last map, so there '
            'would be two, one after the other: set model.backbone.out_norm=False.'
        )


def _check_types(cfg: Config, path: str) -> None:
    """Refuse an entry of the wrong kind, where a tool would fail on it later."""
    for keys, kinds, what in (
        (_DICTS, dict, 'a dict'),
        (_LISTS, (list, tuple), 'a list'),
        (_LISTS_OR_DICTS, (list, dict), 'a dict or a list of dicts'),
        (_STRINGS, str, 'a string'),
    ):
        for key in keys:
            value = cfg
            for part in key.split('.'):
                value = value.get(part) if isinstance(value, (Config, dict)) else None
            if value is not None and not isinstance(value, kinds):
                raise UsageError(f'{path}: {key} must be {what}, not {value!r:.80}.')
    for loader in _DATALOADERS:
        for key, least in (('batch_size', 1), ('num_workers', 0)):
            value = (cfg.get(loader) or {}).get(key, least)
            if not isinstance(value, int) or value < least:
                raise UsageError(
                    f'{path}: {loader}.{key} must be a whole number of {least} or '
                    f'more, not {value!r:.80}.'
                )


def is_detector(cfg: Config) -> bool:
    """Whether the config's model is mmdet's."""
    return _toolbox(cfg) == 'mmdet'


def is_classifier(cfg: Config) -> bool:
    """Whether the config's model is mmpretrain's; else it is mmseg's or mmdet's."""
    return _toolbox(cfg) == 'mmpretrain'


def scope_of(cfg: Config) -> str:
    """The scope in which a config's parts are built."""
    return cfg.get('default_scope') or _toolbox(cfg) or 'mmseg'


def _toolbox(cfg: Config) -> str | None:
    scope = str(cfg.get('model', {}).get('type', '')).partition('.')[0]
    known = ('mmseg', 'mmdet', 'mmpretrain')
    return scope if scope in known else cfg.get('default_scope')


def _check_scope(cfg: Config, path: str) -> None:
    """Refuse a default scope that nobody has, or mmdet's for a model of mmseg's."""
    scope, model = cfg.get('default_scope'), cfg.get('model') or {}
    if scope not in (None, *TOOLBOXES) and not is_scope(scope):
        # mmengine would go on in its own scope, and find none of mmseg's names.
        raise UsageError(
            f'{path}: default_scope={scope!r} is no package with registries that can '
            "be imported; for a segmentor it is 'mmseg', for a detector 'mmdet', for a "
            "classifier 'mmpretrain'."
        )
    if scope == 'mmdet' and 'decode_head' in model and not _has_model('mmdet', model):
        raise UsageError(
            f"{path}: default_scope='mmdet', and mmdet has no model "
            f"{model.get('type')!r}: for a segmentor set default_scope='mmseg'."
        )


def _has_model(scope: str, model: dict) -> bool:
    kind = model.get('type')
    if not isinstance(kind, str) or '.' in kind:
        return True  # It says itself where it is.
    if scope == 'mmdet' and why_no_detection():
        return False
    return MODELS.get(f'{scope}.{kind}') is not None


def _config_of(name: str) -> str:
    """The config of a name of the zoo; paths stay as they are."""
    row = zoo.TABLE.get(name)
    if row is None or Path(name).exists():
        return name
    if not row.configs:
        raise UsageError(f'{name} of the zoo has no config; give the file of one.')
    folder = 'classification/' if row.kind == 'classifier' else ''
    return f'mmvssm::{folder}{row.configs[0]}.py'


def _read(path: str) -> Config:
    packaged = '::' in path
    if not packaged and not Path(path).is_file():
        beside = sorted(p.name for p in Path(path).parent.glob('*.py'))
        hint = f'. That folder has {", ".join(beside)}.' if beside else '.'
        if not Path(path).suffix and path == Path(path).name:
            names = [name for name, row in zoo.TABLE.items() if row.configs]
            otherwise = '; `python -m mmvssm.zoo list` shows them.'
            meant = did_you_mean(near(path, names), otherwise)
            hint = f', and {path!r} is no name of the zoo{meant}'
        raise UsageError(f'no config file at {Path(path).absolute()}{hint}')
    try:
        if packaged:
            return Config.fromstring(f'_base_ = {path!r}', '.py')
        return Config.fromfile(path)
    except Exception as error:
        # A config is a program of the user's: it can fail in any way.
        raise UsageError(
            f'cannot read the config {path}: {type(error).__name__}: {error}'
        ) from error


def check_training(cfg: Config) -> None:
    """Refuse a training that fails at its first step, or does not do what it says.

    Args:
        cfg: The config.

    Raises:
        UsageError: float16 without a GPU, or a batch of one image that is to be mixed.
    """
    kind = str((cfg.get('optim_wrapper') or {}).get('type'))
    if kind.rpartition('.')[2] == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise UsageError(
            "optim_wrapper.type='AmpOptimWrapper' needs a GPU and this machine has "
            'none: train with --amp bfloat16, or in float32 with an OptimWrapper, '
            'which takes no dtype and no loss_scale.'
        )
    size = (cfg.get('train_dataloader') or {}).get('batch_size', 1)
    if is_classifier(cfg) and size == 1 and (mixing := _mixing(cfg.model)):
        raise UsageError(
            f'{mixing} mixes each image with another one of its batch, and '
            'train_dataloader.batch_size=1 has none: set it to 2 or more, or leave '
            'the mixing out.'
        )


def _mixing(model: dict) -> str | None:
    """What of a classifier mixes the images of a batch."""
    preprocessor = model.get('data_preprocessor') or {}
    for key in ('mixup', 'cutmix'):
        if preprocessor.get(key):
            return f'model.data_preprocessor.{key}'
    augments = (model.get('train_cfg') or {}).get('augments') or []
    for part in augments if isinstance(augments, (list, tuple)) else [augments]:
        kind = part.get('type') if isinstance(part, dict) else part
        if kind in ('Mixup', 'CutMix', 'ResizeMix'):
            return f'{kind} of model.train_cfg.augments'
    return None


def enable_amp(cfg: Config, dtype: str = 'bfloat16') -> None:
    """Train in mixed precision.

    A detector gets a :class:`~mmvssm.engine.Float32RegionsHook` besides.

    Args:
        cfg: Changed in place.
        dtype: ``'bfloat16'`` needs no loss scaling and runs on any device,
            the CPU included (:class:`~mmvssm.engine.Bf16OptimWrapper`).
            ``'float16'`` takes mmengine's ``AmpOptimWrapper`` with a dynamic
            loss scale and needs a GPU.

    Raises:
        UsageError: float16 without a GPU, or an optimiser wrapper that mixed
            precision would replace.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'mmvssm.Bf16OptimWrapper'):
        raise UsageError(
            f'--amp replaces an OptimWrapper, but optim_wrapper.type is '
            f'{kind!r}: set its precision in the config instead.'
        )
    for key in ('dtype', 'loss_scale'):
        wrapper.pop(key, None)
    hook = dict(type='mmvssm.Float32RegionsHook')
    if is_detector(cfg) and hook not in (cfg.get('custom_hooks') or []):
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    if dtype == 'bfloat16':
        wrapper.type = 'mmvssm.Bf16OptimWrapper'
    elif get_device() == 'cpu':
        raise UsageError(
            '--amp float16 needs a GPU and this machine has '
            'none: use --amp bfloat16, or leave --amp out.'
        )
    else:
        wrapper.update(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')


def enable_resume(cfg: Config, checkpoint: str | None = None) -> None:
    """Go on with a training.

    Args:
        cfg: Changed in place.
        checkpoint: What to go on from. None: the latest in the work dir; where there
            is none yet, training starts from the config's ``load_from``, if it has
            one. :class:`~mmvssm.engine.SafeCheckpointHook` gets it as ``start_from``.

    Raises:
        UsageError: There is a ``load_from``, but not that hook.
    """
    start = cfg.get('load_from')
    cfg.resume, cfg.load_from = True, checkpoint
    if checkpoint or not start:
        return
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if str(hook.get('type')).rpartition('.')[2] != 'SafeCheckpointHook':
        raise UsageError(
            f'--resume would forget load_from={start} where there is no checkpoint to '
            'resume from: set default_hooks.checkpoint.type=mmvssm.SafeCheckpointHook, '
            'or leave out one of the two.'
        )
    hook.start_from = start


def enable_tta(cfg: Config) -> None:
    """Test at several scales and flipped, with the config's TTA settings.

    Args:
        cfg: Changed in place; needs ``tta_model`` and ``tta_pipeline``.

    Raises:
        UsageError: One of the two is missing, or the test data set.
    """
    missing = [k for k in ('tta_model', 'tta_pipeline') if cfg.get(k) is None]
    if missing:
        raise UsageError(
            f'--tta needs {" and ".join(missing)} in the config; '
            'configs/_base_/default_runtime.py and '
            'configs/_base_/datasets/ade20k.py show them. (mmdet cannot merge '
            "masks, so instance segmentation has none; MMPretrain's tta_model is "
            'AverageClsScoreTTA.)'
        )
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    if dataset is None:
        raise UsageError(
            '--tta needs a dataset in test_dataloader; the config has none.'
        )
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def keep_predictions(cfg: Config, folder: str) -> None:
    """Write what is predicted for every tested image.

    Args:
        cfg: Changed in place. A segmentor writes label maps; a detector
            ``results.bbox.json`` and ``results.segm.json`` in COCO's format; a
            classifier ``predictions.json``.
        folder: Where to.
    """
    metrics = cfg.test_evaluator
    metrics = metrics if isinstance(metrics, list) else [metrics]
    if is_classifier(cfg):
        add_class_report(cfg, predictions=str(Path(folder) / 'predictions.json'))
    elif is_detector(cfg):
        for metric in metrics:
            metric.outfile_prefix = str(Path(folder) / 'results')
        Path(folder).mkdir(parents=True, exist_ok=True)
    else:
        for metric in metrics:
            metric.update(output_dir=folder, keep_results=True)


def add_class_report(cfg: Config, **options: str) -> None:
    """Have a classifier's test report on each class; nothing for other models.

    Args:
        cfg: Changed in place.
        **options: Of :class:`mmvssm.engine.ClassReport`, beside those it has.
    """
    if not is_classifier(cfg):
        return
    metrics = cfg.test_evaluator
    metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
    own = [x for x in metrics if x.get('type') == 'mmvssm.ClassReport']
    if not own:
        own = [ConfigDict(type='mmvssm.ClassReport')]
        metrics += own
    own[0].update(options)
    cfg.test_evaluator = metrics


def enable_painting(
    cfg: Config, show_dir: str | None = None, show: bool = False, wait_time: float = 2.0
) -> None:
    """Paint truth and prediction of every tested image.

    Args:
        cfg: Changed in place; needs a ``visualizer`` and the
            ``visualization`` hook.
        show_dir: Folder for the pictures.
        show: Open a window for each.
        wait_time: Seconds a window stays open.

    Raises:
        UsageError: The config has no visualizer or no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None or cfg.get('visualizer') is None:
        raise UsageError(
            '--show and --show-dir need a visualizer and the hook '
            "default_hooks.visualization=dict(type='SegVisualizationHook') (of a "
            "classifier 'VisualizationHook')."
        )
    settings = dict(show=show, wait_time=wait_time)
    if str(hook.get('type')).rpartition('.')[2] in _VISUALIZATION_HOOKS:
        hook = dict(type='mmvssm.PaintingHook', **settings)
        cfg.default_hooks.visualization = hook
    else:
        hook.update(draw=True, interval=1, **settings)
    if show_dir:
        cfg.visualizer.save_dir = show_dir
