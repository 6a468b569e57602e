"""A training of seconds that draws random numbers wherever one can."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    MODELS,
    OPTIM_WRAPPERS,
)
from torch import nn
from torch.utils.data import BatchSampler

import warm
from mmvssm.engine import PreemptionHook
from tiny import REPO, write_ade, write_config

_CONFIG = """
custom_imports = dict(imports=['toy'])
default_scope = 'mmengine'
model = dict(type='ToyModel')
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='ToyDataset'),
    sampler=dict(type='InfiniteSampler', shuffle=True))
val_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='ToyDataset'),
    sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='ToyMetric')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=4, end={iters})]
train_cfg = dict(type='IterBasedTrainLoop', max_iters={iters}, val_interval=15)
val_cfg = dict(type='ValLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook', by_epoch=False, interval=5,
        max_keep_ckpts=2, save_best='mean', rule='greater'))
custom_hooks = [dict(type='ToyEvent'), dict(type='mmvssm.PreemptionHook'),
                dict(type='mmvssm.NonFiniteLossHook')]
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend='gloo'))
log_processor = dict(by_epoch=False, window_size=1)
randomness = dict(seed=3)
{more}
"""

# Five epochs of six batches each, in place of iterations.
EPOCHS = """
train_dataloader.update(
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='ToyBatches', drop_last=False))
param_scheduler[1] = dict(
    type='MultiStepLR', begin=0, end=5, milestones=[2, 4], gamma=0.3)
train_cfg = dict(type='mmvssm.ResumableEpochLoop', max_epochs=5, val_interval=2)
default_hooks['checkpoint'].update(by_epoch=True, interval=1)
log_processor = dict(by_epoch=True, window_size=1)
"""

# The same epochs for a loop that counts iterations.
EPOCHS_OF_ITERATIONS = """
train_dataloader.update(
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='ToyBatches', drop_last=False))
"""


@DATASETS.register_module()
class ToyDataset(torch.utils.data.Dataset):
    """Images that Python's, NumPy's and torch's generators change."""

    stuck = False

    def __len__(self):
        return 11

    def __getitem__(self, index):
        if self.stuck:
            os.kill(os.getpid(), signal.SIGTERM)
            wait(lambda: False, 60)
        image = torch.full((3, 4, 4), index / 11) + random.random()
        image = image + float(np.random.rand()) + torch.rand(3, 4, 4)
        return dict(inputs=image, img_path=f'image_{index}.png')


@DATA_SAMPLERS.register_module()
class ToyBatches(BatchSampler):
    """Batches of small or of large numbers, as others are of tall or wide images."""

    def __iter__(self):
        left = [[], []]
        for index in self.sampler:
            group = left[index > 5]
            group.append(index)
            if len(group) == self.batch_size:
                yield [*group]
                group.clear()
        yield left[0] + left[1]


@MODELS.register_module()
class ToyModel(BaseModel):
    """A convolution, running statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        # Makes checkpoints larger than logs.
        self.register_buffer('ballast', torch.zeros(50_000))

    def forward(self, inputs, img_path, mode='tensor'):
        x = self.drop(self.norm(self.conv(torch.stack(list(inputs)))))
        if mode == 'loss':
            return dict(loss=(x - 1).square().mean())
        return [dict(value=float(v.mean())) for v in x]


@OPTIM_WRAPPERS.register_module()
class ToyAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's own, which refuses to be made without a GPU, on the CPU.

    The scale grows every seven steps.
    """

    def __init__(self, **options):
        OptimWrapper.__init__(self, **options)
        self.loss_scaler = torch.amp.GradScaler(
            'cpu', init_scale=2.0**121, growth_interval=7
        )
        self._scale_update_param, self.cast_dtype = None, torch.bfloat16


def _register_metric():
    from mmengine.evaluator import BaseMetric
    from mmengine.registry import METRICS

    @METRICS.register_module()
    class ToyMetric(BaseMetric):
        """Draws random numbers, as a validation may."""

        def process(self, data_batch, data_samples):
            random.random(), np.random.rand(), torch.rand(1)
            self.results += [sample['value'] for sample in data_samples]

        def compute_metrics(self, results):
            return dict(mean=-abs(sum(results)))


_register_metric()


@HOOKS.register_module()
class ToyEvent(Hook):
    """What befalls a training, said by the environment variable TOY_EVENT.

    ``SIGNAL@N``: the process sends itself a signal in iteration N. ``later@N``:
    it is killed up to 0.2 s after the start of iteration N. ``fsync@N`` and
    ``replace@N``: it is killed in the N-th such call, which are those of
    saving; ``after-replace@N``: right after it. ``full@N``: from iteration N
    on no checkpoint fits on the disk; ``full2@N``: for two iterations.
    ``nan@N``: an image of iteration N is not finite; ``weight@N``: a weight;
    ``module:NAME@N``: what that module gives.
    ``validation@N``: it is killed as the one after iteration N begins.
    ``stuck@N``: the process is told to stop while it waits in vain for the first
    image after iteration N. ``val-SIGTERM@N``: it is in the validation after that.
    ``hold@N``: iteration N lasts until the training is told to stop. ``lose@N``: in
    iteration N rank 1 is killed, and no other goes on. With TOY_RANK only in that
    rank.
    """

    priority = 'VERY_HIGH'

    def __init__(self):
        what, _, number = os.environ.get('TOY_EVENT', 'none@0').partition('@')
        rank = os.environ.get('TOY_RANK', os.environ.get('RANK', '0'))
        if rank != os.environ.get('RANK', '0'):
            what = 'none'
        self.what, self.number, self.broken = what, int(number), None
        name = what.removeprefix('after-')
        if name in ('fsync', 'replace'):
            self.calls, self.inner = 0, getattr(os, name)
            setattr(os, name, self._call)

    def _call(self, *args):
        self.calls += 1
        if self.calls == self.number and not self.what.startswith('after-'):
            os.kill(os.getpid(), signal.SIGKILL)
        self.inner(*args)
        if self.calls == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.what == 'full2' and runner.iter + 1 == self.number + 2:
            limit_files(None)
        if runner.iter + 1 != self.number:
            return
        if self.what == 'later':
            kill = partial(os.kill, os.getpid(), signal.SIGKILL)
            threading.Timer(random.Random(self.number).random() / 5, kill).start()
        elif self.what.startswith('SIG'):
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.what.startswith('full'):
            limit_files(150_000)
        elif self.what == 'hold':
            Path(runner.work_dir, f'holds_{runner.rank}').touch()
            (stopper,) = (h for h in runner.hooks if isinstance(h, PreemptionHook))
            wait(lambda: stopper.reason)
        elif self.what == 'stuck':
            ToyDataset.stuck = True
        elif self.what == 'lose':
            if runner.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wait(lambda: False)
        elif self.what == 'nan':
            data_batch['inputs'][1][0, 0, 0] = float('nan')
        elif self.what.startswith('module:'):
            module = runner.model.get_submodule(self.what.removeprefix('module:'))
            self.broken = module.register_forward_hook(lambda _, args, out: out / 0)
        elif self.what == 'weight':
            model = getattr(runner.model, 'module', runner.model)
            model.norm.weight.data[0] = float('inf')

    def before_val(self, runner):
        if self.what == 'validation' and runner.iter == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.what == 'val-SIGTERM' and runner.iter == self.number:
            os.kill(os.getpid(), signal.SIGTERM)

    def before_train(self, runner):
        if self.what == 'stuck' and not self.number:
            ToyDataset.stuck = True
        if 'MASTER_PORT' in os.environ:
            path = Path(runner.work_dir, f'port_{runner.rank}')
            path.write_text(os.environ['MASTER_PORT'])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.number and self.broken is not None:
            self.broken.remove()

    def after_train(self, runner):
        if runner.rank == 0 and self.what != 'full':
            model = getattr(runner.model, 'module', runner.model)
            torch.save(model.state_dict(), f'{runner.work_dir}/final.pt')


def wait(ready, seconds=600):
    """Wait until ``ready()`` is true.

    The limit is no measurement: what hangs must not hang the tests.
    """
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f'waited {seconds} seconds in vain')
        time.sleep(0.1)


def limit_files(size):
    """Let no file grow beyond ``size`` bytes; None: no limit."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or hard, hard))


def write_toy(folder, more='', iters=30):
    """Write the training's config, ``toy_config.py``."""
    path = folder / 'toy_config.py'
    path.write_text(_CONFIG.format(more=more, iters=iters))
    return path


# What the toy does without: dropped paths, augmentation, losses of a second head.
_VMAMBA = """
custom_imports = dict(imports=['toy'])
custom_hooks = [dict(type='ToyEvent')]
model['backbone'].update(drop_path_rate=0.3)
model['decode_head'].update(dropout_ratio=0.1)
model['auxiliary_head'].update(dropout_ratio=0.1)
train_pipeline[2:3] = [
    dict(type='RandomResize', scale=(96, 64), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion')]
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(interval={interval}, max_keep_ckpts=2, save_best='mIoU'))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=4, end={iters})]
train_cfg = dict(max_iters={iters}, val_interval={iters} // 3)
optim_wrapper = dict(optimizer=dict(lr=0.003))
randomness = dict(seed=3)
{more}
"""


def write_vmamba(folder, more='', iters=60, interval=7):
    """Write ``toy_config.py`` for a small VMamba UperNet, and its data."""
    recipe = _VMAMBA.format(more=more, iters=iters, interval=interval)
    data = write_ade(folder / 'ade', train=7)
    norm = "type='BN', requires_grad=True"
    return write_config(folder / 'toy_config.py', data, recipe, norm=norm)


def environment(event='', **more):
    """Environment of one run."""
    return {
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        'PYTHONPATH': f'{REPO}:{REPO / "tests"}',
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
        'TOY_EVENT': event or 'none@0',
        **more,
    }


def train_each(folder, *runs, configs=None):
    """Run ``tools/train.py`` several times, one after the other.

    Each run is (event, options of train.py ...); each has its config in ``configs``,
    or all have ``toy_config.py``. Returns exit code (minus the
    signal's number where one killed it) and output of each.
    """
    results, configs = [], configs or ['toy_config.py'] * len(runs)
    for config, (event, *options) in zip(configs, runs):
        done = warm.run(
            [REPO / 'tools/train.py', config, *options],
            cwd=folder,
            env={**os.environ, **environment(event)},
            merge=True,
            # Not a measurement: a training that hangs must not hang the tests.
            timeout=300,
        )
        results.append((done.returncode, done.stdout))
    return results


def train_pair(folder, *options, **variables):
    """Run ``tools/train.py`` as two ranks, without a launcher; what each gives."""
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE='2')
    with tempfile.TemporaryDirectory() as logs:
        paths = [Path(logs, f'{rank}.txt') for rank in range(2)]
        ranks = []
        try:
            for rank, path in enumerate(paths):
                own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
                ranks.append(
                    warm.start(
                        [REPO / 'tools/train.py', *options, '--launcher', 'pytorch'],
                        path,
                        path,
                        cwd=folder,
                        env={**os.environ, **meeting, **own, **variables},
                    )
                )
            # Not a measurement: those that wait for each other must not hang the tests.
            codes = [rank.wait(300) for rank in ranks]
        except BaseException:
            for rank in ranks:
                warm.kill(rank)
            raise
        return [(code, path.read_text()) for code, path in zip(codes, paths)]


def free_port():
    """A port for a program to listen on, as text."""
    return str(free_ports(1)[0])


def free_ports(count):
    """Ports on which nobody listens.

    They are below those that the system gives to sockets without a port. So no other
    socket gets one by chance before its program listens.
    """
    given = Path('/proc/sys/net/ipv4/ip_local_port_range')
    first_given = int(given.read_text().split()[0]) if given.exists() else 32768
    found = []
    # A test's seed would have processes at the same time take the same ports.
    for port in random.SystemRandom().sample(range(10_000, first_given), 1000):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(('127.0.0.1', port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError('there are no free ports')


def train_ranks(folder, *options, event='', **variables):
    """Run two ranks through ``tools/dist_train.sh``; exit code and output."""
    done = subprocess.run(
        [REPO / 'tools/dist_train.sh', 'toy_config.py', '2', *map(str, options)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment(event, **variables)},
    )
    return done.returncode, done.stdout + done.stderr


def final_weights(folder, work_dir='out'):
    return torch.load(folder / work_dir / 'final.pt')


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
