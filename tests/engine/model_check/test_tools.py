"""tools/train.py with models that it refuses, and with those that it leaves alone."""

import os
import subprocess

import pytest
import torch

import doubled_batch
import warm
from tiny import REPO, write_ade, write_config
from toy import free_port

pytest.importorskip('mmseg')
TRAIN = REPO / 'tools/train.py'
# Random numbers in every step, a map that nothing uses, norms with running statistics.
LAST_MAP_ALONE = """
model['backbone'].update(drop_path_rate=0.3)
model['decode_head'] = dict(
    _delete_=True, type='FCNHead', in_channels=64, in_index=3, channels=8, num_convs=1,
    num_classes=150, dropout_ratio=0.3, norm_cfg=norm_cfg)
model['auxiliary_head'] = None
"""


@pytest.fixture
def work(tmp_path):
    write_ade(tmp_path / 'ade', 4, 1)
    return tmp_path


def environment(**more):
    return os.environ | dict(OMP_NUM_THREADS='1', MMVSSM_DATA_CHECK='0') | more


def train(work, *options, **variables):
    command = [TRAIN, 'tiny.py', *options]
    return warm.run(command, cwd=work, env=environment(**variables), merge=True)


def test_a_training_with_it_has_the_same_bits(work):
    write_config(work / 'tiny.py', work / 'ade', LAST_MAP_ALONE)
    found = {}
    for check in '01':
        done = train(
            *(work, '--work-dir', check, '--cfg-options', 'randomness.seed=1'),
            MMVSSM_MODEL_CHECK=check,
        )
        assert done.returncode == 0, done.stdout[-2000:]
        assert ('no loss depends on maps 0, 1, 2' in done.stdout) == (check == '1')
        found[check] = torch.load(work / check / 'iter_2.pth', weights_only=False)
    without, with_it = (found[check] for check in '01')
    for part in ('state_dict', 'optimizer'):
        pairs = zip(tensors(without[part]), tensors(with_it[part]), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), part
    assert len(list(tensors(with_it['optimizer']))) > 10


def tensors(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (dict, list)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from tensors(child)


def test_one_image_ends_in_one_sentence(work):
    write_config(work / 'tiny.py', work / 'ade')
    done = train(work, '--cfg-options', 'train_dataloader.batch_size=1')
    assert done.returncode == 2, done.stdout[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith('error: batch norm decode_head.psp_modules.0.1.bn gets one')
    assert 'Traceback' not in done.stdout


def test_two_processes_end_in_one_sentence(work):
    write_config(work / 'tiny.py', work / 'ade', LAST_MAP_ALONE)
    done = subprocess.run(
        [REPO / 'tools/dist_train.sh', 'tiny.py', '2'],
        cwd=work,
        env=doubled_batch.environment(
            work, PORT=free_port(), MMVSSM_DATA_CHECK='0', MMVSSM_MODEL_CHECK='1'
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count('error: no loss depends on maps 0, 1, 2') == 1
    assert 'UsageError' not in done.stderr and 'RuntimeError' not in done.stderr
