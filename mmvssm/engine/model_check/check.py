"""Refuse a model whose parts fail each other in training, before it begins."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mmvssm.engine.checkpoints.weights import unwrap
from mmvssm.engine.configs.config import is_classifier, is_detector
from mmvssm.engine.configs.data import leaves
from mmvssm.engine.configs.image_sizes import Size, training_batches
from mmvssm.engine.errors import UsageError
from mmvssm.engine.launching.ranks import Ranks

from .advice import norm_setting, with_changes, without_unused_maps
from .batches import OneImage, find_one_image
from .probe import Seen, look, lost_parameters, without_traces
from .samples import (
    classification_sample,
    detection_sample,
    segmentation_sample,
)

VARIABLE = 'MMVSSM_MODEL_CHECK'
# Sides of the image, in pixels. In the small one a map of stride 32 has 2x2 places, in
# the large one a map of stride 128.
_SMALL, _LARGE = 64, 256


def probe_model(runner: Runner) -> None:
    """Compute a loss on one small made-up image, and refuse what training would not do.

    A batch norm cannot learn from one value a channel, as one image gives it where maps
    are pooled to one place. A parameter of the backbone that no loss depends on, as the
    output norm of a map that no head uses, is one that DDP refuses; in one process
    there is a warning. Models for which that loss cannot be computed are let pass.

    Rank 0 looks; the others wait for what it says. Model and random numbers stay as
    they are. Nothing happens where the environment variable ``MMVSSM_MODEL_CHECK``
    is 0.

    Args:
        runner: Before its training starts.

    Raises:
        UsageError: Training would fail. On all ranks.
    """
    if os.environ.get(VARIABLE) == '0':
        return
    ranks = Ranks()
    processes = get_world_size()
    said = ''
    if is_main_process():
        try:
            with without_traces():
                said = _find_error(runner.model, runner.cfg, processes)
        except Exception as error:
            # A model of another kind can fail in any way.
            text = f'the model was not looked into: {type(error).__name__}: {error}'
            print_log(text, 'current', logging.DEBUG)
    said = ranks.gather(said)[0]
    if said:
        raise UsageError(said)


def _find_error(wrapped: nn.Module, cfg: Config, processes: int) -> str:
    """Log warnings; returns the error, '' without one."""
    model = unwrap(wrapped)
    if is_classifier(cfg) and (text := _wrong_channels(model)):
        return text
    sample = _sample_of(cfg)
    smallest = min((batch[1:] for batch in training_batches(cfg)), key=math.prod)
    size, large = (_within(smallest, side) for side in (_SMALL, _LARGE))
    try:
        seen = look(model, size, sample(size))
    except Exception:
        # Some heads need larger maps.
        size = large
        seen = look(model, size, sample(size))
    norms = [n for n in seen.single if not _is_shared(model, cfg, n, processes)]
    one = None
    if norms:
        one = find_one_image(cfg, processes, lambda: _count_images(cfg))
    if one and size != large:
        # A small image may have made the map small.
        norms = [n for n in look(model, large, sample(large)).single if n in norms]
    if one and norms:
        return _describe_norms(model, cfg, norms, one, processes)
    refused = _refuses_unused(wrapped)
    if refused and seen.idle:
        print_log(
            f'{_shorten(seen.idle)}: no gradient was found on the way to the loss. If '
            'DDP stops at the second iteration, set find_unused_parameters=True.',
            'current',
            logging.WARNING,
        )
    if seen.all_used or not seen.used:
        return ''
    lost = lost_parameters(model.backbone, size, seen.used)
    if not lost:
        return ''
    changes = _changes(model, cfg, seen, size, sample(size))
    text = _describe_maps(model, seen, lost, changes, refused)
    if refused:
        return text
    print_log(text, 'current', logging.WARNING)
    return ''


def _wrong_channels(model: nn.Module) -> str:
    """A classifier's head for another number of channels than it gets."""
    neck = getattr(model, 'neck', None)
    if neck is not None and type(neck).__name__ != 'GlobalAveragePooling':
        return ''
    wanted = getattr(model.head, 'in_channels', None)
    channels = getattr(model.backbone, 'out_channels', None)
    if not isinstance(wanted, int) or not isinstance(channels, tuple):
        return ''
    if wanted == channels[-1]:
        return ''
    return (
        f'model.head.in_channels is {wanted}, and the last map of the backbone has '
        f'{channels[-1]} channels: set model.head.in_channels={channels[-1]}.'
    )


def _sample_of(cfg: Config) -> Callable[[Size], Any]:
    """What makes a data sample with what the config's pipeline loads."""
    if is_classifier(cfg):
        return classification_sample
    if not is_detector(cfg):
        return segmentation_sample
    pipelines = [x.get('pipeline') or [] for x in leaves(cfg.train_dataloader.dataset)]
    masks = any(part.get('with_mask') for pipeline in pipelines for part in pipeline)
    return partial(detection_sample, masks=masks)


def _within(size: Size, side: int) -> Size:
    return min(size[0], side), min(size[1], side)


def _refuses_unused(model: nn.Module) -> bool:
    """Whether it is DDP, told that every parameter gets a gradient."""
    return isinstance(model, DistributedDataParallel) and not (
        model.find_unused_parameters or getattr(model, 'static_graph', False)
    )


def _is_shared(model: nn.Module, cfg: Config, name: str, processes: int) -> bool:
    """Whether a norm sees the images of all processes."""
    norm = model.get_submodule(name)
    # Norms of a model in shards are replaced later.
    becomes_sync = (cfg.get('strategy') or {}).get('sync_bn')
    kind = _BatchNorm if becomes_sync else SyncBatchNorm
    return processes > 1 and isinstance(norm, kind)


def _count_images(cfg: Config) -> int:
    """Images of the training's data set; 0 where others will say what it lacks."""
    try:
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        return len(dataset)
    except Exception:
        return 0


def _describe_norms(
    model: nn.Module,
    cfg: Config,
    norms: Sequence[str],
    one: OneImage,
    processes: int,
) -> str:
    settings = {norm_setting(model, cfg.model, name) for name in norms}
    on_cpu = get_device() == 'cpu'
    ways = list(one.remedies)
    for name, groups in sorted(settings):
        if name:
            ways.append(f"model.{name}=dict(type='GN', num_groups={groups})")
    if processes > 1 and not on_cpu:
        sync_bn = 'strategy.sync_bn' if cfg.get('strategy') else 'sync_bn'
        ways.append(f"{sync_bn}='torch', so that it sees the images of all processes")
    are_batch = all(isinstance(model.get_submodule(x), _BatchNorm) for x in norms)
    kind = 'batch norm' if are_batch else 'norm'
    subject = (
        f'{kind}s {_shorten(norms)} get' if norms[1:] else f'{kind} {norms[0]} gets'
    )
    notes = ', and accumulated gradients do not change that' * _accumulates(cfg)
    notes += ' (on CPUs SyncBN is BN)' * (processes > 1 and on_cpu)
    return (
        f'{subject} one value a channel from an image and cannot learn from a batch of '
        f'one, but {one.text}{notes}: set {", or ".join(ways)}.'
    )


def _accumulates(cfg: Config) -> bool:
    return (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1) > 1


def _changes(
    model: nn.Module, cfg: Config, seen: Seen, size: Size, sample: Any
) -> dict[str, Any]:
    """Settings with which the loss depends on every map; {} where none are found."""
    indices = getattr(model.backbone, 'out_indices', None)
    if indices is None or len(indices) != len(seen.shapes):
        return {}
    changes = without_unused_maps(model, cfg.model, indices, seen.used)
    try:
        shapes = [seen.shapes[i] for i in seen.used]
        changed = with_changes(cfg.model, changes, shapes)
        return changes if look(changed, size, sample).all_used else {}
    except Exception:
        # Some other part has to change with them.
        return {}


def _describe_maps(
    model: nn.Module,
    seen: Seen,
    lost: Sequence[str],
    changes: dict[str, Any],
    refused: bool,
) -> str:
    indices = getattr(model.backbone, 'out_indices', range(len(seen.shapes)))
    unused = [str(x) for i, x in enumerate(indices) if i not in seen.used]
    kept = tuple(x for i, x in enumerate(indices) if i in seen.used)
    settings = ', '.join(f'model.{name}={value!r}' for name, value in changes.items())
    if not changes:
        settings = (
            f'model.backbone.out_indices={kept!r}, and in_channels, in_index or '
            'start_level of what takes the maps to match'
        )
    where = '' if refused else ' in trainings of several processes'
    return (
        f'no loss depends on map{"s" * (len(unused) > 1)} {", ".join(unused)} of '
        f'model.backbone.out_indices={tuple(indices)!r}, so {_shorten(lost)} get no '
        f'gradient, which DDP refuses{where}: set {settings}.'
    )


def _shorten(names: Sequence[str]) -> str:
    if len(names) < 3:
        return ' and '.join(names)
    return f'{names[0]} and {len(names) - 1} more'
