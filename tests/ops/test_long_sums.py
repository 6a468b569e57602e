"""No op leaves a long sum to a library, which may cut it among threads.

Libraries do so on some processors only, and only some of the time. Here every
product that an op asks torch for is looked at, on any processor.
"""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops.deterministic_math import (
    BLAS_TERMS,
    HALF_TERMS,
    ONEDNN_TERMS,
    linear_product,
)

from .backends_under_test import NATIVE_BACKENDS, on, takes
from .ops_under_test import LONG, bidirectional_scan, case_name, linear, ss2d_scan

aten, onednn = torch.ops.aten, torch.ops.mkldnn
# Of every product the argument whose last axis is summed over.
_PRODUCTS = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.mv: 0,
    aten.dot: 0,
    aten.addmm: 1,
    aten.addmv: 1,
    aten.baddbmm: 1,
    aten.addbmm: 1,
    aten.linear: 0,
    aten.matmul: 0,
    onednn._linear_pointwise: 0,
}


class NoLongSums(TorchDispatchMode):
    """Refuse products, and sums to a single number, that are too long."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == 'mmvssm':
            # What the op does is asked of torch anew, so that it is seen here.
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
        packet = function.overloadpacket
        out = function(*args, **(kwargs or {}))
        if packet in _PRODUCTS:
            x = args[_PRODUCTS[packet]]
            by_onednn = packet is onednn._linear_pointwise
            limit = HALF_TERMS if x.dtype.itemsize == 2 else BLAS_TERMS
            limit = ONEDNN_TERMS if by_onednn else limit
            assert x.shape[-1] <= limit, f'{function}: a sum of {x.shape[-1]} terms'
            assert not by_onednn or 1 not in out.shape, f'{function}: {out.shape}'
        if packet in (aten.sum, aten.mean) and out.numel() == 1:
            # torch cuts such a sum among threads from 2**15 terms on.
            assert args[0].numel() < 2**15, f'{function}: {args[0].numel()} terms'
        assert 'conv' not in packet.__name__, function
        return out


CASES = [
    on(backend, dtype, make, size)
    for backend in NATIVE_BACKENDS
    for make, sizes in LONG.items()
    for size in sizes
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if takes(backend, dtype)
    # A linear layer is torch's own unless the backend is cpu.
    and (make is not linear or (backend, dtype) == ('cpu', torch.float32))
]


@pytest.mark.parametrize('backend, dtype, make, size', CASES, ids=case_name)
def test_no_long_sums(backend, dtype, make, size):
    case = make(*size, dtype=dtype)
    with NoLongSums():
        case.run(backend)


@pytest.mark.parametrize('backend', NATIVE_BACKENDS)
@pytest.mark.parametrize('make', [ss2d_scan, bidirectional_scan], ids=case_name)
def test_no_long_sums_under_autocast(backend, make):
    case = make(*LONG[make][0], dtype=torch.float32)
    with NoLongSums(), torch.autocast('cpu', torch.bfloat16):
        case.run(backend)


def test_the_mode_sees_long_sums():
    x, weight = torch.randn(2, 5000), torch.randn(3, 5000)
    with NoLongSums():
        linear_product(x, weight)
        for product in (torch.nn.functional.linear, lambda a, b: a @ b.t()):
            with pytest.raises(AssertionError, match='a sum of 5000 terms'):
                product(x, weight)
        with pytest.raises(AssertionError, match='a sum of 5000 terms'):
            onednn._linear_pointwise(x, weight, None, 'none', [], '')
        with pytest.raises(AssertionError, match='terms'):
            torch.randn(2**15).sum()
