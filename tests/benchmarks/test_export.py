"""export.py: what is held against the targets."""

import importlib.util

import pytest

from .conftest import BENCHMARKS


@pytest.fixture
def benchmark(load):
    for module in ('onnx', 'onnxruntime'):
        pytest.importorskip(module)
    load('machines')
    # `export` is a folder of tests as well.
    spec = importlib.util.spec_from_file_location('bench', BENCHMARKS / 'export.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(nodes=100, seconds=1.0, error=1e-6):
    form = dict(
        nodes=nodes,
        functions=0,
        bytes=1,
        error=dict(onnxruntime=error),
        changed=dict(onnxruntime=0.0),
    )
    times = {'pytorch': 2.0, 'onnxruntime, plain': seconds}
    return dict(
        size=[224, 224], forms=dict(plain=form, function=form), seconds={'1': times}
    )


def marks(benchmark, **changes):
    found = benchmark.targets({'vmamba_t_s1l8': row(**changes)})
    return {what: shown for _, what, _, _, shown in found}


def test_targets_are_met(benchmark):
    found = marks(benchmark)
    assert found['onnxruntime, plain'] == '0.5'
    assert not any('!' in shown for shown in found.values())
    assert 'nodes, plain' in benchmark.tables({'vmamba_t_s1l8': row()})


@pytest.mark.parametrize(
    'changes, what',
    [
        (dict(nodes=1901), 'nodes, plain'),
        (dict(seconds=2.5), 'onnxruntime, plain'),
        (dict(seconds=float('nan')), 'onnxruntime, plain'),
        (dict(error=float('nan')), 'error, onnxruntime'),
        (dict(error=2e-5), 'error, onnxruntime'),
    ],
)
def test_missed_targets_are_marked(benchmark, changes, what):
    found = marks(benchmark, **changes)
    assert found[what].endswith('!')
