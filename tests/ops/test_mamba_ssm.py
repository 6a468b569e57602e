"""The backend mamba_ssm, over a stand-in with the published function's manners."""

import dataclasses
import sys
import warnings
from types import ModuleType

import pytest
import torch

from mmvssm import ops
from mmvssm.ops import backends, mamba_ssm, selective_scan
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.torch_backend import TorchScan

from .scan_inputs import (
    OPTIONAL,
    as_double,
    gradients,
    relative_error,
    scan_inputs,
    ss2d_inputs,
)

INTERFACE = 'mamba_ssm.ops.selective_scan_interface'
MODULES = ('mamba_ssm', 'mamba_ssm.ops', INTERFACE, 'selective_scan_cuda')


SCAN = TorchScan(backends.TORCH)


class Published(torch.autograd.Function):
    """What the kernels check, the dtypes they return, the gradient they drop."""

    calls = []

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert {x.dtype for x in (u, delta, B, C)} == {u.dtype}
        assert z is None or z.dtype == u.dtype
        assert {x.dtype for x in (A, D, delta_bias) if x is not None} == {torch.float32}
        assert u.dtype in (torch.float32, torch.bfloat16, torch.float16)
        assert not torch.is_autocast_enabled('cpu')
        Published.calls.append(u.dtype)
        ctx.delta_softplus = delta_softplus
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        options = ScanOptions(delta_softplus, u.dtype)
        (out, last), saved, _ = SCAN.forward(ScanInputs(*inputs), options, True)
        ctx.save_for_backward(*inputs, *saved)
        # Channels-first, whatever the strides of u.
        return out.contiguous(), last

    @staticmethod
    def backward(ctx, grad, _):
        *inputs, saved = ctx.saved_tensors
        options = ScanOptions(ctx.delta_softplus, grad.dtype)
        inputs = ScanInputs(*inputs)
        grads = SCAN.backward(inputs, options, (saved,), (grad, None), inputs)
        return *(g if x is not None else None for g, x in zip(grads, inputs)), None


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    cu_seqlens=None,
):
    out, last = Published.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last) if return_last_state else out


@pytest.fixture
def installed(monkeypatch):
    """Put a stand-in where the package would be."""
    mamba_ssm._found.cache_clear()
    modules = {name: ModuleType(name) for name in MODULES}
    modules[INTERFACE].selective_scan_fn = selective_scan_fn
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    mamba_ssm._found.cache_clear()


@pytest.fixture
def on_cpu(installed, monkeypatch):
    """Let the backend take CPU tensors, too; torch may give bits that differ."""
    backend = dataclasses.replace(
        backends.suppliers['mamba_ssm'],
        devices=('cpu', 'cuda'),
        unavailable=lambda: None,
    )
    monkeypatch.setitem(backends.suppliers, 'mamba_ssm', backend)
    monkeypatch.setattr(Published, 'calls', [])
    torch.use_deterministic_algorithms(False)


def run(inputs, backend='mamba_ssm', last_state=False, **options):
    out, last = selective_scan(
        **inputs,
        delta_softplus=True,
        return_last_state=True,
        backend=backend,
        **options,
    )
    outputs = (out, last) if last_state else (out,)
    return dict(out=out, last=last, **gradients(outputs, inputs))


def assert_close(got, want, tolerance):
    for name, x in want.items():
        assert relative_error(got[name], x) <= tolerance, name


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'shape,optional',
    [
        ((2, 6, 13, 16), OPTIONAL),
        ((2, 6, 13, 3, 2), ('D',)),
        ((1, 4, 5, 1, 4), ()),
        ((1, 3, 1, 2), OPTIONAL),
    ],
)
def test_numbers(on_cpu, shape, optional, channels_last):
    inputs = scan_inputs(
        *shape, optional=optional, dtype=torch.float32, channels_last=channels_last
    )
    got = run(inputs)
    assert_close(got, run(as_double(inputs), 'reference'), 2e-6)
    assert got['out'].stride() == inputs['u'].stride()
    assert Published.calls == [torch.float32]
    with torch.no_grad():
        out = selective_scan(**inputs, delta_softplus=True, backend='mamba_ssm')
    assert torch.equal(out, got['out'])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_16_bit_inputs(on_cpu, dtype):
    inputs = scan_inputs(2, 6, 13, 4, dtype=dtype)
    want = run(as_double(inputs), 'reference')
    got = run(inputs)
    assert got['out'].dtype == dtype and got['last'].dtype == torch.float32
    assert_close(got, want, 2e-2)
    # Some of them wider: nothing is rounded to the dtype of the rest.
    inputs['delta'] = inputs['delta'].detach().float().requires_grad_()
    assert run(inputs)['out'].dtype == dtype
    assert Published.calls == [dtype, torch.float32]
    # Under autocast the output is float32, and exact.
    with torch.autocast('cpu', dtype):
        got = run(inputs)
    assert got['out'].dtype == torch.float32
    assert relative_error(got['out'], want['out']) < 2e-6


def test_compiled(on_cpu):
    inputs = scan_inputs(2, 4, 9, 3, dtype=torch.float32, channels_last=True)

    @torch.compile(fullgraph=True, backend='aot_eager')
    def compiled(inputs):
        return selective_scan(**inputs, delta_softplus=True, backend='mamba_ssm')

    out = compiled(inputs)
    want = run(inputs)
    del want['last']
    assert_close(dict(out=out, **gradients((out,), inputs)), want, 1e-6)
    assert out.stride() == inputs['u'].stride()


def test_through_fused_ops(on_cpu):
    """The others are made of the scan where a backend has no form of them."""
    inputs = ss2d_inputs(1, 4, 3, 5, 2, 1, dtype=torch.float32)
    out = ops.ss2d_scan(**inputs, backend='mamba_ssm')
    assert Published.calls
    want = ops.ss2d_scan(**as_double(inputs), backend='reference')
    assert relative_error(out, want) < 2e-6


@pytest.mark.parametrize('compiled', [False, True])
def test_gradient_of_the_last_state_is_refused(on_cpu, compiled):
    inputs = scan_inputs(1, 2, 3, 2, dtype=torch.float32)

    def loss(inputs):
        _, last = selective_scan(**inputs, return_last_state=True, backend='mamba_ssm')
        return last.sum()

    if compiled:
        loss = torch.compile(loss, backend='aot_eager')
    with pytest.raises(RuntimeError, match='no gradient of the last state'):
        loss(inputs).backward()


def test_refused_in_deterministic_mode(on_cpu):
    inputs = scan_inputs(1, 2, 3, 2, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ops.BackendUnavailableError, match='differ from run to run'):
        run(inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match='differ from run to run'):
        run(inputs)
    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run(inputs)


def test_chosen_behind_fused_kernels(on_cpu, monkeypatch):
    without = dataclasses.replace(backends.CPU, unavailable=lambda: 'not compiled')
    monkeypatch.setitem(backends.suppliers, 'cpu', without)
    assert ops.choose_backend('cpu', torch.float32) == 'mamba_ssm'
    # It knows no gradient of the last state, and torch may ask for the same bits.
    assert ops.choose_backend('cpu', torch.float32, last_state=True) == 'torch'
    torch.use_deterministic_algorithms(True)
    assert ops.choose_backend('cpu', torch.float32) == 'torch'
    torch.use_deterministic_algorithms(False)


def test_chosen_by_name(on_cpu):
    with ops.use_backend('mamba_ssm'):
        assert ops.choose_backend('cpu', torch.float32) == 'mamba_ssm'
        with pytest.raises(ops.BackendUnavailableError, match='1 to 256 states'):
            ops.choose_backend('cpu', torch.float32, states=257)


def test_what_it_needs(installed, monkeypatch):
    def reason():
        mamba_ssm._found.cache_clear()
        return ops.backend_status()['mamba_ssm']

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert reason() is None
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert reason() == 'torch sees no CUDA device'
    del installed[INTERFACE].selective_scan_fn
    assert 'no selective_scan_fn' in reason()
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', None)
    assert 'MAMBA_KEEP_CUDA_BUILD=TRUE' in reason()
    monkeypatch.setitem(sys.modules, 'mamba_ssm', None)
    assert 'not installed' in reason()


@pytest.mark.parametrize(
    'package,kernels,expected',
    [
        ('import selective_scan_cuda', None, 'without its compiled module'),
        ('import einops_of_nobody', '', "No module named 'einops_of_nobody'"),
        ('', 'raise OSError("undefined symbol")', 'built for another torch'),
        ('raise OSError("no")', '', 'cannot be imported: no'),
    ],
)
def test_broken_installations(monkeypatch, tmp_path, package, kernels, expected):
    """Packages on disk that fail in the middle of their import."""
    mamba_ssm._found.cache_clear()
    (tmp_path / 'mamba_ssm').mkdir()
    (tmp_path / 'mamba_ssm' / '__init__.py').write_text(package)
    if kernels is not None:
        (tmp_path / 'selective_scan_cuda.py').write_text(kernels)
    monkeypatch.syspath_prepend(tmp_path)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        assert expected in ops.backend_status()['mamba_ssm']
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
