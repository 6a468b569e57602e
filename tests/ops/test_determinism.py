"""The same inputs give the same bits, run after run and at any thread count."""

import pytest
import torch

from mmvssm.ops import deterministic_math
from mmvssm.ops.cpu import library

from .backends_under_test import NATIVE_BACKENDS, on, on_every_isa, takes
from .ops_under_test import LONG, case_name, linear, selective_scan, ss2d_scan

THREADS = (1, 2, 3, 7)
# Ops whose kernels know more than one layout.
LAYOUTS = (selective_scan, ss2d_scan)


def assert_same_bits(set_threads, run):
    results = []
    for threads in (*THREADS, THREADS[0]):
        set_threads(threads)
        results.append(run())
    for threads, result in zip((*THREADS[1:], THREADS[0]), results[1:]):
        for name, want in results[0].items():
            assert not want.isnan().any(), name
            assert torch.equal(result[name], want), (name, threads)


CASES = [
    on(backend, dtype, make, size)
    for backend in NATIVE_BACKENDS
    for make, sizes in LONG.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if takes(backend, dtype)
    # A linear layer is torch's own unless the backend is cpu.
    and (make is not linear or (backend, dtype) == ('cpu', torch.float32))
    for size in (sizes if dtype == torch.float32 else sizes[:1])
]


@pytest.mark.parametrize('backend, dtype, make, size', CASES, ids=case_name)
def test_ops(set_threads, backend, dtype, make, size):
    case = make(*size, dtype=dtype)
    assert_same_bits(set_threads, lambda: case.run(backend))


@pytest.mark.parametrize(
    'backend, make, size',
    [on(name, make, LONG[make][0]) for name in NATIVE_BACKENDS for make in LAYOUTS],
    ids=case_name,
)
def test_channels_last(set_threads, backend, make, size):
    case = make(*size, dtype=torch.float32, channels_last=True)
    assert_same_bits(set_threads, lambda: case.run(backend))


@pytest.mark.parametrize(
    'backend, size',
    [
        *[on(name, (1, 1, 70001, 1, 1)) for name in NATIVE_BACKENDS],
        on('reference', (2, 4096, 5, 16, 4)),
    ],
)
def test_one_channel_and_the_reference(set_threads, backend, size):
    case = selective_scan(*size, dtype=torch.float32)
    assert_same_bits(set_threads, lambda: case.run(backend))


@on_every_isa()
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'make, size',
    [
        *[(selective_scan, size) for size in LONG[selective_scan]],
        (selective_scan, (5, 130, 100, 3, 2)),
        (ss2d_scan, (1, 130, 23, 31, 5, 1)),
        (ss2d_scan, (3, 48, 9, 40, 3, 4)),
    ],
    ids=case_name,
)
def test_kernels(set_threads, isa, make, size, channels_last):
    case = make(*size, dtype=torch.float32, channels_last=channels_last)
    with library.use_isa(isa):
        assert_same_bits(set_threads, lambda: case.run('cpu'))


@pytest.mark.parametrize(
    'function',
    [
        deterministic_math.softplus,
        deterministic_math.sigmoid,
        deterministic_math.silu,
        lambda x: deterministic_math.sum_rows(x[None, :, None]),
    ],
)
def test_elementary_functions(set_threads, function):
    x = 3 * torch.randn(300001, generator=torch.Generator().manual_seed(0))
    assert_same_bits(set_threads, lambda: dict(y=function(x)))


# Inner sizes around every limit at which a library was seen to cut a sum.
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('terms', [96, 129, 1024, 3136, 21000])
@pytest.mark.parametrize('transposed', [False, True])
def test_linear_product(set_threads, dtype, terms, transposed):
    generator = torch.Generator().manual_seed(0)

    def random(rows):
        x = torch.randn(rows, terms, generator=generator).to(dtype)
        return x.t().contiguous().t() if transposed else x

    pairs = [(random(m), random(n)) for m, n in ((1, 17), (32, 96), (48, 80), (300, 1))]

    def run():
        products = (deterministic_math.linear_product(x, w) for x, w in pairs)
        return {str(i): y for i, y in enumerate(products)}

    assert_same_bits(set_threads, run)
