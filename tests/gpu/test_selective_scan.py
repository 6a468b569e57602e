"""selective_scan on the device against its definition, at the shapes of models."""

import pytest
import torch

from mmvssm.ops import selective_scan
from ops.scan_inputs import (
    OPTIONAL,
    as_double,
    gradients,
    relative_error,
    scan_inputs,
)

from .on_device import CUDA, DEVICE, cuda, moved, on

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Longest sequence on which the truth is the definition itself, a Python loop.
LOOP = 400
VMAMBA, VIM = ('D', 'delta_bias'), OPTIONAL
# Batch, channels, length, states, groups; what is not None.
SHAPES = {
    'length 1': ((3, 24, 1, 16, 1), VIM),
    'length 49': ((2, 96, 49, 1, 4), VMAMBA),
    'length 196': ((2, 192, 196, 1, 4), VMAMBA),
    'length 197': ((2, 96, 197, 16, 1), VIM),
    'length 3136': ((2, 192, 3136, 1, 4), VMAMBA),
    'length 3136, 16 states': ((1, 96, 3136, 16, 4), VMAMBA),
    'length 6085': ((1, 64, 6085, 16, 1), VIM),
    'length 64000': ((1, 16, 64000, 1, 4), VMAMBA),
    'length 64000, 16 states': ((1, 8, 64000, 16, 1), VIM),
    '8 states': ((2, 40, 333, 8, 2), VIM),
    '5 states': ((1, 20, 131, 5, 1), VIM),
    '33 states': ((1, 7, 77, 33, 1), ()),
    '256 states': ((1, 6, 130, 256, 1), VIM),
    'many rows': ((64, 384, 49, 1, 4), VMAMBA),
    'nothing but the scan': ((2, 17, 100, 3), ()),
}


def run(inputs, backend):
    """Outputs and gradients by name."""
    out, last = selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, backend=backend
    )
    # Of mamba_ssm the last state has no gradient.
    outputs = (out,) if backend == 'mamba_ssm' else (out, last)
    return dict(out=out, last=last, **gradients(outputs, inputs))


def truth(inputs, backend):
    """In float64, by the definition or the form that is held against it below."""
    exact = as_double(inputs)
    length = inputs['u'].shape[2]
    out, last = selective_scan(
        **exact,
        delta_softplus=True,
        return_last_state=True,
        backend='reference' if length <= LOOP else 'torch',
    )
    outputs = (out,) if backend == 'mamba_ssm' else (out, last)
    return dict(out=out, last=last, **gradients(outputs, exact))


def assert_close(got, want, tolerance):
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, errors


# Kernels are compiled anew for another layout, so that is for a few of them.
CHANNELS_FIRST = ('length 1', 'length 49', 'length 197', 'nothing but the scan')
LAYOUTS = [(name, True) for name in SHAPES] + [(name, False) for name in CHANNELS_FIRST]


@on()
@pytest.mark.parametrize('name,channels_last', LAYOUTS)
def test_float32(name, channels_last, backend):
    shape, optional = SHAPES[name]
    if not CUDA and shape[1] * shape[2] * shape[3] > 2**18:
        pytest.skip('too large for a check of the tests')
    inputs = moved(
        scan_inputs(
            *shape, optional=optional, dtype=torch.float32, channels_last=channels_last
        )
    )
    got = run(inputs, backend)
    assert got['out'].stride() == inputs['u'].stride()
    assert_close(got, truth(inputs, backend), TOLERANCE[torch.float32])


@on()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['length 49', 'length 197', '8 states', '256 states'])
def test_16_bit(name, dtype, backend):
    shape, optional = SHAPES[name]
    inputs = moved(scan_inputs(*shape, optional=optional, channels_last=True), dtype)
    for parameter in {'A', 'D', 'delta_bias'} & inputs.keys():
        inputs[parameter] = inputs[parameter].detach().float().requires_grad_()
    if backend == 'cpu' and dtype == torch.float16:
        pytest.skip('cpu does not take float16')
    got, want = run(inputs, backend), truth(inputs, backend)
    assert got['out'].dtype == dtype and got['last'].dtype == torch.float32
    assert_close(got, want, TOLERANCE[dtype])
    with torch.autocast(torch.device(DEVICE).type, dtype):
        out = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert out.dtype == torch.float32
    assert relative_error(out, want['out']) < 1e-5


@pytest.mark.parametrize('states', [1, 16])
def test_truth_of_long_sequences(states):
    """What stands for the definition, a loop, agrees with it."""
    length = 3136 if CUDA else 401
    inputs = moved(scan_inputs(1, 4, length, states, dtype=torch.float32))
    exact = as_double(inputs)
    assert_close(truth(inputs, None), run(exact, 'reference'), 1e-10)


@on()
def test_tensors_that_are_parts_of_others(backend):
    """Any strides; a zero stride, too."""
    inputs = scan_inputs(2, 12, 70, 4, 2, dtype=torch.float32)
    whole = torch.randn(2, 71, 30)
    inputs['u'] = whole[:, 1:, 3:15].mT
    inputs['z'] = whole[:, 1:, 15:27].mT
    inputs['B'] = inputs['B'][:1].expand(2, -1, -1, -1)
    inputs = {name: x.detach().to(DEVICE) for name, x in inputs.items()}
    dense = {name: x.clone().contiguous() for name, x in inputs.items()}
    got, want = (
        run({name: x.requires_grad_() for name, x in tensors.items()}, backend)
        for tensors in (inputs, dense)
    )
    assert_close(got, want, 1e-5)


@cuda
@on(('cuda',))
@pytest.mark.parametrize('channels_last', [True, False], ids=['last', 'first'])
def test_more_elements_than_32_bits_can_count(channels_last, backend):
    batch, channels, length = 2, 1024, 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip('needs 45 GiB of free memory on the GPU')
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        x = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return x.mT if channels_last else x

    row = (batch, length, channels) if channels_last else (batch, channels, length)
    weight = (batch, length, 1) if channels_last else (batch, 1, length)
    u, delta, grad = (normal(*row) for _ in range(3))
    B, C = (normal(*weight) for _ in 'BC')
    assert u.numel() > 2**31
    A = -torch.rand(channels, 1, generator=generator, device=DEVICE)
    leaves = [u.requires_grad_(), delta.requires_grad_()]
    out = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    # The last channels of the last sequence have the highest addresses.
    part = (slice(-1, None), slice(-4, None))
    exact = [x.detach()[part].double().requires_grad_() for x in (u, delta)]
    out = selective_scan(
        *exact,
        A[-4:].double(),
        *(x[-1:].double() for x in (B, C)),
        delta_softplus=True,
        backend='torch',
    )
    want = [out, *torch.autograd.grad(out, exact, grad[part].double())]
    for name, x, y in zip(('out', 'u', 'delta'), got, want):
        assert relative_error(x[part], y) < TOLERANCE[torch.bfloat16], name
