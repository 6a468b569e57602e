"""Kernels with other tiles than their own, in Triton's interpreter.

``test_tuning.py`` runs them in a process of their own, for the reason that
``triton_interpreted.py`` names.
"""

import pytest
import torch

from mmvssm.ops.triton import tune, tuning


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(tune, '_DEVICE', 'cpu')
    torch.manual_seed(0)


@pytest.mark.parametrize(
    'task',
    [
        tune.scan_task(1, 1, 3, 21, 2, backward=False),
        tune.scan_task(1, 1, 3, 21, 2, backward=True),
        tune.convolution_task(1, 5, 21),
        tune.norm_task(9, 12),
    ],
    ids=lambda task: task.name,
)
def test_results_do_not_depend_on_the_tile(on_cpu, task):
    """Up to rounding; of the warps the interpreter knows nothing."""
    inputs = task.inputs()
    want = task.run(*inputs)
    default = task.function(*task.sizes)
    # The interpreter takes as long for a larger tile as for much work.
    halved = [n for n in default._fields if n not in (*task.fixed, 'warps')]
    for name in halved:
        tile = default._replace(**{name: getattr(default, name) // 2})
        assert tile in tune.neighbours(default)
        with tuning.trying(task.name, task.sizes, tile._asdict()):
            assert task.function(*task.sizes) == tile
            got = task.run(*inputs)
        for x, y in zip(got, want):
            error = (x.float() - y.float()).norm() / y.float().norm()
            assert error < 1e-2, tile
