"""One training in two ways: one process with two images, two with one each."""

import json
import os
import subprocess
import sys

import pytest

import warm
from tiny import REPO, write_ade, write_config

STEPS = 4
# Options of train.py.
ONE = ('tiny.py', '--work-dir', 'one')
TWO = ('tiny.py', '--work-dir', 'two')
TWO += ('--cfg-options', 'train_dataloader.batch_size=1')

# Nothing random after the initialisation, and norms that do not mix images:
# the mean of two half-batch gradients is then the whole batch's.
_RECIPE = f"""
custom_imports = dict(imports=['record'])
custom_hooks = [dict(type='Record')]
train_dataloader.update(sampler=dict(shuffle=False))
optim_wrapper = dict(optimizer=dict(
    _delete_=True, type='SGD', lr=0.05, momentum=0.9,
    weight_decay=0.01))
param_scheduler = []
train_cfg = dict(max_iters={STEPS})
"""

_RECORD = """
import hashlib
import json
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Record(Hook):

    losses = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(float(outputs['loss']))

    def after_train(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.numpy().tobytes())
        with open(f'{runner.work_dir}/rank{runner.rank}.json', 'w') as file:
            json.dump([self.losses, digest.hexdigest(),
                       type(runner.model).__name__], file)
"""


def write(work):
    """Write the data set and the config."""
    (work / 'record.py').write_text(_RECORD)
    write_ade(work / 'ade', train=6)
    write_config(
        work / 'tiny.py',
        work / 'ade',
        _RECIPE,
        norm="type='GN', num_groups=4, requires_grad=True",
    )


def run_one(work):
    """Train in one process."""
    check(warm.run([REPO / 'tools/train.py', *ONE], cwd=work, env=environment(work)))


def run(command, work, **variables):
    """Run one of the scripts in ``work``."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=work,
        capture_output=True,
        text=True,
        env=environment(work, **variables),
    )
    check(done)


def environment(work, **variables):
    path = variables.pop('PATH', os.environ['PATH'])
    return {
        **os.environ,
        'PATH': f'{os.path.dirname(sys.executable)}:{path}',
        'OMP_NUM_THREADS': '1',
        # An accelerator would be taken if there were one.
        'CUDA_VISIBLE_DEVICES': '',
        'PYTHONPATH': f'{REPO}:{work}',
        **variables,
    }


def check(done):
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def outcome(work):
    """[losses, hash, wrapper] of the single process and of both ranks."""
    return [
        json.loads((work / name).read_text())
        for name in ('one/rank0.json', 'two/rank0.json', 'two/rank1.json')
    ]


def assert_same_weights(outcome):
    _, (_, first, wrapper), (_, second, _) = outcome
    assert wrapper == 'MMDistributedDataParallel'
    assert first == second


def assert_same_losses(outcome):
    (single, *_), (first, *_), (second, *_) = outcome
    assert len(single) == len(first) == len(second) == STEPS
    # Each rank saw images of its own, and training changed the loss.
    assert first != second
    assert abs(single[-1] - single[0]) > 1e-2
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert mean == pytest.approx(single, rel=1e-5)
