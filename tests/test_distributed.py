"""Two processes train what one process trains on the whole batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import REPO, write_ade, write_config

pytest.importorskip('mmseg')

STEPS = 4

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


def run(command, cwd, **env):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        # An accelerator would be taken if there were one.
        env={
            **os.environ,
            'PATH': path,
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
            'PYTHONPATH': str(cwd),
            **env,
        },
    )
    assert done.returncode == 0, done.stderr[:6000]


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    """[losses, hash, wrapper] of the single process and of both ranks."""
    work = tmp_path_factory.mktemp('distributed')
    (work / 'record.py').write_text(_RECORD)
    write_ade(work / 'ade', train=6)
    write_config(
        work / 'tiny.py',
        work / 'ade',
        _RECIPE,
        norm="type='GN', num_groups=4, requires_grad=True",
    )
    run([sys.executable, REPO / 'tools/train.py', 'tiny.py', '--work-dir', 'one'], work)
    run(
        [
            REPO / 'tools/dist_train.sh',
            'tiny.py',
            2,
            '--work-dir',
            'two',
            '--cfg-options',
            'train_dataloader.batch_size=1',
        ],
        work,
        PORT=free_port(),
    )
    return [
        json.loads((work / name).read_text())
        for name in ('one/rank0.json', 'two/rank0.json', 'two/rank1.json')
    ]


def test_both_ranks_hold_the_same_weights(outcome):
    _, (_, first, wrapper), (_, second, _) = outcome
    assert wrapper == 'MMDistributedDataParallel'
    assert first == second


def test_losses_are_those_of_one_process_with_both_batches(outcome):
    (single, *_), (first, *_), (second, *_) = outcome
    assert len(single) == len(first) == len(second) == STEPS
    # Each rank saw images of its own, and training changed the loss.
    assert first != second
    assert abs(single[-1] - single[0]) > 1e-2
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert mean == pytest.approx(single, rel=1e-5)
