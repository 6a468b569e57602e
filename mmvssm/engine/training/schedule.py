"""Another length of a training, and how long one takes on this machine."""

import math
import statistics
import time

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmvssm.engine.configs.config import scope_of
from mmvssm.engine.errors import UsageError

_WARM_UP_ITERATIONS = 3
_FEWEST_ITERATIONS = 5


def set_iterations(cfg: Config, iterations: int) -> None:
    """Train for another number of iterations, with the same curve of learning rates.

    Schedulers that end with the training also end with the new one. Their warm-up
    keeps its length. Validations keep their number.

    Args:
        cfg: A config whose ``train_cfg`` has ``max_iters``. Changed in place.
        iterations: At least 1.

    Raises:
        UsageError: The number is below 1, or a scheduler begins behind it.
    """
    if iterations < 1:
        raise UsageError(f'a training has at least 1 iteration, not {iterations}.')
    before = cfg.train_cfg.max_iters
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        for key in ('end', 'T_max'):
            if scheduler.get(key) == before:
                scheduler[key] = iterations
        begin, end = scheduler.get('begin', 0), scheduler.get('end', iterations)
        if begin >= end:
            raise UsageError(
                f'{iterations} iterations are too few: a {scheduler.type} of '
                f'param_scheduler begins at iteration {begin}. Train for more than '
                f'{begin}.'
            )
    interval = cfg.train_cfg.get('val_interval')
    if interval:
        validations = max(1, before // interval)
        cfg.train_cfg.val_interval = math.ceil(iterations / validations)
    cfg.train_cfg.max_iters = iterations


def measure_iteration(cfg: Config, seconds: float = 3.0) -> float:
    """Time training iterations of a config on this machine, in one process.

    The model and the data are the config's. Nothing is kept.

    Args:
        cfg: A config of mmseg's, mmdet's or mmpretrain's, whose data exists.
        seconds: How long to measure.

    Returns:
        Seconds of one iteration, the median.
    """
    init_default_scope(scope_of(cfg))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    # Without the groups of its parameters, which are logged one by one.
    wrapper = {k: v for k, v in cfg.optim_wrapper.items() if k != 'paramwise_cfg'}
    optimizer = build_optim_wrapper(model, wrapper)
    batches = iter(Runner.build_dataloader(cfg.train_dataloader, seed=0))
    taken: list[float] = []
    while len(taken) < _WARM_UP_ITERATIONS + _FEWEST_ITERATIONS or (
        sum(taken) < seconds
    ):
        start = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(Runner.build_dataloader(cfg.train_dataloader, seed=0))
            continue
        model.train_step(batch, optimizer)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[_WARM_UP_ITERATIONS:])
