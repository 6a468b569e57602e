"""The ``torch`` backend launches few kernels on a GPU, and needs little memory."""

import subprocess
import sys

import pytest
import torch

from tiny import REPO

# Batch, channels, length and states -> launches forward and backward, at most: four
# routes of VMamba's first map at 224x224 (one and two channels wide) and of larger
# images; Vim.
LIMITS = {
    (128, 4 * 96, 56 * 56, 1): (700, 1500),
    (128, 4 * 192, 56 * 56, 1): (700, 1500),
    (4, 4 * 96, 128 * 128, 1): (700, 1500),
    (4, 4 * 192, 128 * 128, 1): (700, 1500),
    (128, 384, 197, 16): (700, 1500),
    (128, 768, 197, 16): (700, 1500),
    (2, 4 * 96, 320 * 200, 1): (1000, 2200),
    (2, 4 * 192, 320 * 200, 1): (1000, 2200),
}


@pytest.fixture
def launches(load):
    return load('launches')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', LIMITS, ids=str)
def test_limits(launches, shape, dtype):
    forward, backward, work = launches.count(*shape, dtype=dtype)
    assert 0 < forward <= LIMITS[shape][0]
    assert 0 < backward <= LIMITS[shape][1]
    batch, channels, length, _ = shape
    sequence = batch * channels * length * dtype.itemsize
    assert sequence // 10 < work <= max(5e8, 8 * sequence)


def test_the_command(launches):
    sizes = ['--batch', '2', '--channels', '6', '--length', '40', '--states', '3']
    command = [sys.executable, str(REPO / 'benchmarks' / 'launches.py'), *sizes]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, numbers = found.split()[::2], found.split()[1::2]
    assert found.count('\n') == 1
    assert names == ['forward', 'backward', 'bytes']
    assert all(int(number) > 0 for number in numbers)


def test_what_launches(launches):
    x = torch.empty(4, 6, device='meta')
    with launches.Launches() as found:
        torch.empty_like(x)
        x.t().unflatten(0, (2, 3)).select(0, 1).unbind(0)
    assert found.number == 0
    with launches.Launches() as found:
        y = x + 1
        y[:, 1:].mul_(2)
        torch.addcmul(x, x, x, out=y)
        y.t().contiguous()
        y.to(torch.bfloat16)
        torch.zeros_like(x)
        y.sum(0)
        torch.nn.functional.pad(x, (1, 1))
    assert found.number == 7 + 2


def test_what_is_alive(launches):
    """Inputs, views and what is returned do not count, nor what has gone."""
    x = torch.empty(1000, dtype=torch.float32, device='meta')
    with launches.Launches() as found:
        a = x[:500] + 1  # 2000
        b = torch.cat((a, x))  # 6000 more
        del a
        c = b[:250] * 2  # 1000 more
        returned = x + x  # returned
        view = returned.view(10, 100)
    assert found.peak([view]) == 8000
    assert found.peak([]) == 6000 + 1000 + 4000
    assert found.peak([returned, c]) == 8000
