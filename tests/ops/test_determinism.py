"""The same inputs give the same bits, run after run and at any thread count."""

import pytest
import torch

from mmvssm.ops import numerics, selective_scan, ss2d_scan
from mmvssm.ops.cpu import library

from .backends_under_test import FAST_BACKENDS, on, on_backends, on_every_isa
from .scan_inputs import gradients, scan_inputs, ss2d_inputs

THREADS = (1, 2, 3, 4, 7)


def assert_same_bits(set_threads, run):
    results = []
    for threads in (*THREADS, THREADS[0]):
        set_threads(threads)
        results.append(run())
    for threads, result in zip((*THREADS[1:], THREADS[0]), results[1:]):
        for name, want in results[0].items():
            assert torch.equal(result[name], want), (name, threads)


# Large enough that torch really cuts the work, small enough for the loop.
SHAPES = [(2, 96, 3136, 1, 4), (1, 384, 196, 16, 1), (1, 7, 333, 5, 1)]


def scan_with_gradients(inputs, backend):
    out, last = selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, backend=backend
    )
    return dict(out=out, last=last, **gradients((out, last), inputs))


@pytest.mark.parametrize(
    'backend,shape',
    [
        *[
            on(name, shape)
            for name in FAST_BACKENDS
            for shape in (*SHAPES, (1, 1, 70001, 1, 1))
        ],
        on('reference', (2, 4096, 5, 16, 4)),
    ],
)
def test_selective_scan(set_threads, backend, shape):
    inputs = scan_inputs(*shape, dtype=torch.float32)
    assert_same_bits(set_threads, lambda: scan_with_gradients(inputs, backend))


@on_every_isa()
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', [*SHAPES, (5, 130, 100, 3, 2)])
def test_selective_scan_kernels(set_threads, isa, shape, channels_last):
    inputs = scan_inputs(*shape, dtype=torch.float32, channels_last=channels_last)
    with library.use_isa(isa):
        assert_same_bits(set_threads, lambda: scan_with_gradients(inputs, 'cpu'))


MAPS = [
    (1, 96, 56, 56, 6, 1),
    (2, 192, 28, 28, 12, 1),
    (1, 384, 14, 14, 24, 1),
    (2, 64, 33, 47, 4, 16),
]


def ss2d_with_gradients(inputs, backend):
    y = ss2d_scan(**inputs, backend=backend)
    return dict(y=y, **gradients((y,), inputs))


@on_backends(*FAST_BACKENDS)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('shape', MAPS)
def test_ss2d_scan(set_threads, shape, channels_last, backend):
    inputs = ss2d_inputs(*shape, dtype=torch.float32, channels_last=channels_last)
    assert_same_bits(set_threads, lambda: ss2d_with_gradients(inputs, backend))


@on_every_isa()
@pytest.mark.parametrize('shape', [(1, 130, 23, 31, 5, 1), (3, 48, 9, 40, 3, 4)])
def test_ss2d_scan_kernels(set_threads, isa, shape):
    inputs = ss2d_inputs(*shape, dtype=torch.float32, channels_last=True)
    with library.use_isa(isa):
        assert_same_bits(set_threads, lambda: ss2d_with_gradients(inputs, 'cpu'))


@pytest.mark.parametrize(
    'function',
    [
        numerics.softplus,
        numerics.sigmoid,
        numerics.silu,
        lambda x: numerics.sum_rows(x[None, :, None]),
    ],
)
def test_elementary_functions(set_threads, function):
    x = 3 * torch.randn(300001, generator=torch.Generator().manual_seed(0))
    assert_same_bits(set_threads, lambda: dict(y=function(x)))
