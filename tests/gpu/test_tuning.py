"""Tiles measured on the GPU at hand."""

import json

import pytest
import torch

from mmvssm.ops.cache import CACHE_VARIABLE
from mmvssm.ops.triton import runtime, tiles, tune, tuning

from .on_device import cuda


@cuda
@pytest.mark.parametrize(
    'task',
    [tune.norm_task(999, 96), tune.scan_task(2, 4, 24, 49, 1, backward=True)],
    ids=lambda task: task.name,
)
def test_tile_is_found_and_used(monkeypatch, tmp_path, task):
    reason = runtime.unavailable()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    tuning.table.cache_clear()
    best = tune.tune(task)
    assert getattr(tiles, task.name)(*task.sizes) == best
    (key,) = json.loads(tuning.path().read_text())
    assert torch.cuda.get_device_name() in key
    tuning.table.cache_clear()
