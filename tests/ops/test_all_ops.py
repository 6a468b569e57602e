"""What holds for every op on every backend."""

import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad, gradcheck
from torch.library import opcheck

import mmvssm
from compare import relative_error
from mmvssm.ops.add_norm.cpu_backend import CpuNorm
from mmvssm.ops.bidirectional_scan.cpu_backend import CpuBidirectional
from mmvssm.ops.cpu import library
from mmvssm.ops.linear_attention.cpu_backend import CpuAttention
from mmvssm.ops.operator import all_ops, public_ops
from mmvssm.ops.selective_scan.cpu_backend import CpuScan
from mmvssm.ops.ss2d_scan.cpu_backend import CpuSs2d

from .backends_under_test import BACKENDS, on, precision, takes
from .ops_under_test import (
    SMALL,
    case_name,
)

OPS = list(SMALL)
every = pytest.mark.parametrize(
    'backend, make',
    [on(backend, make) for backend in BACKENDS for make in OPS],
    ids=case_name,
)
every_op = pytest.mark.parametrize('make', OPS, ids=case_name)
CODE = str(Path(mmvssm.__file__).parent)
COMPILED = (CpuScan, CpuSs2d, CpuBidirectional, CpuNorm, CpuAttention)


def make_case(make, backend, **options):
    return make(*SMALL[make], dtype=precision(backend)[0], **options)


def truth(make):
    return make(*SMALL[make]).run('reference')


def served(case, backend):
    """What serves the call."""
    call = case.asked(backend)
    return case.op.backend(backend, call.inputs, call.options)


def assert_right(case, backend, want, tolerance):
    """Outputs and gradients are right, and of the promised dtype and strides."""
    got = case.run(backend)
    for name, x in want.items():
        assert relative_error(got[name], x) < tolerance, name
    call = case.asked(backend)
    promised = case.op.outputs_like(call.inputs, call.options)
    named = {f'output {i}': like for i, like in enumerate(promised)} | case.inputs
    for name, like in named.items():
        assert got[name].dtype == like.dtype, name
        # Where torch differentiates by itself, strides are its own.
        if not served(case, backend).differentiable:
            assert got[name].stride() == like.stride(), name


@every
def test_right(backend, make):
    tolerance = 10 * precision(backend)[1]
    assert_right(make_case(make, backend), backend, truth(make), tolerance)


def test_every_op_is_here():
    names = {op.name for f, op in public_ops.items() if 'mmvssm.' in f.__module__}
    assert {make.__name__ for make in OPS} == names


@every
def test_opcheck(backend, make):
    """torch's own checks of an op: schema, fake kernel, autograd, compilation."""
    case = make_case(make, backend)
    if served(case, backend).differentiable:
        pytest.skip('composed of other ops')
    opcheck(case.op.torch_op, case.arguments(backend))


@every
def test_nothing_is_kept(backend, make):
    """Without ``keep`` the outputs are the same, and there is no backward pass."""
    case = make_case(make, backend)
    if served(case, backend).differentiable:
        pytest.skip('composed of other ops')
    op, count = case.op, len(case.op.returns)
    kept, bare = (
        (found,) if isinstance(found, torch.Tensor) else found
        for found in (op.torch_op(*case.arguments(backend, k)) for k in (True, False))
    )
    assert len(kept) == len(bare)
    for got, want in zip(bare[:count], kept):
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert all(x.shape == (0,) for x in bare[count:])
    with pytest.raises(RuntimeError, match=f'{op.name}: .* no backward pass'):
        bare[0].sum().backward()
    # The fake kernel gives the same.
    tests = ('test_schema', 'test_faketensor')
    opcheck(op.torch_op, case.arguments(backend, False), test_utils=tests)


@every
def test_gradcheck(backend, make):
    if not takes(backend, torch.float64):
        pytest.skip('finite differences need float64')
    case = make(*SMALL[make])
    names = list(case.inputs)

    def function(*tensors):
        return case.call(dict(zip(names, tensors)), backend=backend)

    assert gradcheck(function, tuple(case.inputs.values()), fast_mode=True)


@every
@pytest.mark.parametrize('gradients', [False, True])
def test_compile_fullgraph(backend, make, gradients):
    case = make_case(make, backend)
    torch._dynamo.reset()

    def function(*tensors):
        return case.call(dict(zip(case.inputs, tensors)), backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    with torch.set_grad_enabled(gradients):
        results = [f(*case.inputs.values()) for f in (compiled, function)]
    if gradients:
        weights = [torch.ones_like(y) for y in results[0]]
        results = [
            torch.autograd.grad(ys, list(case.inputs.values()), weights)
            for ys in results
        ]
    for got, want in zip(*results):
        assert relative_error(got, want) < 1e-5


@every
def test_export(backend, make):
    case = make_case(make, backend)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return case.call(tensors, backend=backend)

    inputs = {name: x.detach() for name, x in case.inputs.items()}
    exported = torch.export.export(Module(), (inputs,)).module()
    for got, want in zip(exported(inputs), case.call(inputs, backend=backend)):
        assert relative_error(got, want) < 1e-5


# Tangents, against finite differences in float64.


def directional(case, backend, tangents, step=1e-6):
    """The change of the outputs with the inputs, by differences."""
    with torch.no_grad():
        ends = [
            case.call(
                {k: x + sign * step * tangents[k] for k, x in case.inputs.items()},
                backend=backend,
            )
            for sign in (1, -1)
        ]
    return [(a - b) / (2 * step) for a, b in zip(*ends)]


def tangents_of(case):
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for name, x in case.inputs.items()
    }


@every
@pytest.mark.parametrize('way', ['jvp', 'forward_ad', 'linearize', 'jacfwd'])
def test_tangents(backend, make, way):
    case = make(*SMALL[make])
    tangents = tangents_of(case)
    want = directional(case, 'reference', tangents)
    dtype, _ = precision(backend)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    case = make(*SMALL[make], dtype=dtype)
    names = list(case.inputs)
    primals = tuple(x.detach() for x in case.inputs.values())
    values = tuple(tangents[name].to(dtype) for name in names)

    def function(*tensors):
        return case.call(dict(zip(names, tensors)), backend=backend)

    if way == 'jvp':
        _, got = torch.func.jvp(function, primals, values)
    elif way == 'linearize':
        _, linear_map = torch.func.linearize(function, *primals)
        got = linear_map(*values)
    elif way == 'forward_ad':
        with forward_ad.dual_level():
            outputs = function(*map(forward_ad.make_dual, primals, values))
            got = [forward_ad.unpack_dual(y).tangent for y in outputs]
    else:
        jacobian = torch.func.jacfwd(
            lambda s: function(*(p + s * v for p, v in zip(primals, values)))
        )
        got = jacobian(torch.zeros((), dtype=dtype))
    for g, w in zip(got, want):
        assert relative_error(g, w) < tolerance


@every
def test_gradients_of_gradients(backend, make):
    case = make_case(make, backend)
    reference = make(*SMALL[make])

    def second(case, backend):
        leaves = list(case.inputs.values())
        outputs = case.call(case.inputs, backend=backend)
        first = torch.autograd.grad(
            [y.square().sum() for y in outputs], leaves, create_graph=True
        )
        return torch.autograd.grad([g.square().sum() for g in first], leaves)

    tolerance = 1e-8 if takes(backend, torch.float64) else 1e-3
    for got, want in zip(second(case, backend), second(reference, 'reference')):
        assert relative_error(got, want) < tolerance


@every
def test_vmap(backend, make):
    """One by one, or together: the same."""
    case = make_case(make, backend)
    first = next(iter(case.inputs))
    x = case.inputs[first].detach()
    rest = {k: t.detach() for k, t in case.inputs.items() if k != first}
    xs = torch.stack([x, 2 * x])

    def function(x):
        return case.call({first: x, **rest}, backend=backend)

    got = torch.func.vmap(function)(xs)
    for i, x in enumerate(xs):
        for ys, want in zip(got, function(x)):
            assert relative_error(ys[i], want) < 1e-5


@every
def test_func_grad(backend, make):
    case = make_case(make, backend)
    inputs = {name: x.detach() for name, x in case.inputs.items()}

    def loss(inputs):
        return sum(y.sum() for y in case.call(inputs, backend=backend))

    got = torch.func.grad(loss)(inputs)
    outputs = case.call(case.inputs, backend=backend)
    want = torch.autograd.grad(sum(y.sum() for y in outputs), [*case.inputs.values()])
    for g, w in zip(got.values(), want):
        assert relative_error(g, w) < 1e-5


# The way from the public function to the launch.


def functions_under_way():
    """How many functions of the package are on the stack of the caller's caller."""
    frame, count = sys._getframe(2), 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith(CODE)
        frame = frame.f_back
    return count


@every
@pytest.mark.parametrize('gradients', [False, True])
def test_four_functions_to_the_launch(backend, make, gradients, monkeypatch):
    """From the public function, itself among them, to a kernel.

    For compiled kernels that is the call of C, for others the backend's forward pass.
    """
    case = make_case(make, backend)
    counts = []
    call = case.asked(backend)
    if isinstance(case.op.backend(backend, call.inputs, call.options), COMPILED):
        kernel = library._kernel

        def watched(function):
            def launch(*args):
                counts.append(functions_under_way())
                return kernel(function)(*args)

            return launch

        monkeypatch.setattr(library, '_kernel', watched)
    else:
        composed = [op._composed(backend) for op in all_ops.values() if op._composed]
        own = [found for op in all_ops.values() for found in op.backends.values()]
        for cls in {type(found) for found in [*composed, *own]}:

            def forward(self, *args, _forward=cls.forward, **kwargs):
                counts.append(functions_under_way() + 1)
                return _forward(self, *args, **kwargs)

            monkeypatch.setattr(cls, 'forward', forward)
    with torch.set_grad_enabled(gradients):
        case.call(case.inputs, backend=backend)
    assert 2 <= max(counts) <= 4, counts
