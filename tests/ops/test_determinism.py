"""The same inputs give the same bits, run after run and at any thread count."""

import pytest
import torch

from mmvssm.ops import list_backends, numerics, selective_scan, ss2d_scan

from .scan_inputs import gradients, scan_inputs, ss2d_inputs

THREADS = (1, 2, 3, 4, 7)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(set_threads, run):
    results = []
    for threads in (*THREADS, THREADS[0]):
        set_threads(threads)
        results.append(run())
    for threads, result in zip((*THREADS[1:], THREADS[0]), results[1:]):
        for name, want in results[0].items():
            assert torch.equal(result[name], want), (name, threads)


# Large enough that torch really cuts the work, small enough for the loop.
@pytest.mark.parametrize(
    'backend,shape',
    [
        *[
            (name, shape)
            for name in list_backends()
            if name != 'reference'
            for shape in (
                (2, 96, 3136, 1, 4),
                (1, 384, 196, 16, 1),
                (1, 7, 333, 5, 1),
                (1, 1, 70001, 1, 1),
            )
        ],
        ('reference', (2, 4096, 5, 16, 4)),
    ],
)
def test_selective_scan(set_threads, backend, shape):
    inputs = scan_inputs(*shape, dtype=torch.float32)

    def run():
        out, last = selective_scan(
            **inputs, delta_softplus=True, return_last_state=True, backend=backend
        )
        return dict(out=out, last=last, **gradients((out, last), inputs))

    assert_same_bits(set_threads, run)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'shape',
    [
        (1, 96, 56, 56, 6, 1),
        (2, 192, 28, 28, 12, 1),
        (1, 384, 14, 14, 24, 1),
        (2, 64, 33, 47, 4, 16),
    ],
)
def test_ss2d_scan(set_threads, shape, channels_last):
    inputs = ss2d_inputs(*shape, dtype=torch.float32, channels_last=channels_last)

    def run():
        y = ss2d_scan(**inputs)
        return dict(y=y, **gradients((y,), inputs))

    assert_same_bits(set_threads, run)


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
