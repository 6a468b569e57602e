"""scan_cpu.py: the floor that it measures the kernels by."""

import pytest

from mmvssm.engine import UsageError
from mmvssm.ops.cpu import library


def test_floor_compiles_and_measures(load):
    """Its program is written against the headers of the kernels."""
    reason = library.unavailable()
    if reason or not library.is_threaded():
        pytest.skip(reason or 'no threads of torch')
    floor = load('scan_cpu_floor')
    try:
        floor.compiler()
    except UsageError as error:
        pytest.skip(str(error))
    functions = floor.Floor(values=2**12, passes=10).functions(1)
    costs = {name: function() for name, function in functions.items()}
    assert set(costs) == {'stream', 'exp2', 'softplus', 'fma'}
    assert all(cost > 0 for cost in costs.values()), costs
