"""The CUDA kernels of residual addition and RMS norm, emulated on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import add_rms_norm
from mmvssm.ops.add_norm.cuda_backend import CudaNorm
from mmvssm.ops.add_norm.declaration import NormInputs, NormOptions
from mmvssm.ops.cuda import kernels

from .cuda_emulation import AVAILABLE
from .cuda_emulation.guarded import guarded, stays_inside
from .cuda_emulation.orders import differs_in_some_order, fails_without
from .scan_inputs import gradients, relative_error

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
BARRIERS = (
    'gradients of the weight',
    'sums of rows are read',
    'sums of the warps of a row',
)


def make_inputs(rows, channels, residual=True, dtype=FLOAT, stream=None, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return scale * torch.randn(shape, generator=generator)

    inputs = dict(x=normal(rows, channels).to(dtype), weight=1 + normal(channels) / 10)
    if residual:
        inputs['residual'] = normal(rows, channels).to(stream or dtype)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def definition(x, weight, residual=None, eps=1e-5):
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def compare(inputs, in_fp32=False, bound=2e-6):
    """Results and gradients with those in float64."""
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    got = add_rms_norm(**inputs, residual_in_fp32=in_fp32, backend='cuda')
    want = definition(**double)
    for x, y in zip(got, want):
        assert relative_error(x, y) < bound
    got, want = gradients(got, inputs), gradients(want, double)
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype
        assert relative_error(got[name], want[name]) < bound, name


@pytest.mark.parametrize(
    'rows,channels,residual',
    [
        (5, 24, True),
        (70, 64, True),  # several rows for each CTA
        (1, 7, False),
        (3, 1, True),
        (9, 50, False),
        (3, 384, False),
        (3, 400, True),  # two warps a row
        (2, 1001, False),  # four, of single elements
        (3, 3076, True),  # longer than what a CTA holds
        (2, 3075, False),
        (1, 70_000, True),
    ],
)
def test_matches_the_definition(rows, channels, residual):
    # Small enough for eps to matter.
    compare(make_inputs(rows, channels, residual, scale=0.01))


@pytest.mark.parametrize('in_fp32', [False, True])
@pytest.mark.parametrize(
    'dtype,stream', [(BF16, BF16), (BF16, FLOAT), (HALF, BF16), (FLOAT, HALF)], ids=str
)
def test_dtypes(dtype, stream, in_fp32):
    inputs = make_inputs(5, 24, dtype=dtype, stream=stream)
    # The gradients that come in have the dtypes of the results.
    bound = max(torch.finfo(dtype).eps, torch.finfo(stream).eps)
    compare(inputs, in_fp32, bound)


def test_sums_are_float32():
    """The gradient of the weight is not rounded to the dtype of the rows."""
    x, weight, residual, grads = plain_inputs(30, 24, BF16)
    *_, by_weight = computed(x, weight, residual, grads)
    unit = F.rms_norm(x.double() + residual.double(), weight.shape, eps=1e-5)
    assert by_weight.dtype == FLOAT
    assert relative_error(by_weight, (unit * grads[0].double()).sum(0)) < 2e-6


def test_weight_of_another_dtype():
    inputs = make_inputs(5, 24)
    inputs['weight'] = inputs['weight'].detach().bfloat16().requires_grad_()
    compare(inputs, bound=torch.finfo(BF16).eps)


@pytest.mark.parametrize('which', ['out', 'total'])
@pytest.mark.parametrize('shape', [(40, 24), (2, 3076)])
def test_gradient_of_one_result(which, shape):
    inputs = make_inputs(*shape)
    index = ('out', 'total').index(which)
    names = [name for name in inputs if which == 'out' or name != 'weight']
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    got = add_rms_norm(**inputs, backend='cuda')[index]
    want = definition(**double)[index]
    got = gradients((got,), {name: inputs[name] for name in names})
    want = gradients((want,), {name: double[name] for name in names})
    for name in names:
        assert relative_error(got[name], want[name]) < 2e-6, name


def computed(x, weight, residual, grads):
    """By the backend itself: the norm, the stream and their gradients."""
    options = NormOptions(1e-5, x.dtype, residual.dtype, residual.dtype, True)
    inputs = NormInputs(x, weight, residual)
    backend = CudaNorm()
    found = backend.backward(inputs, options, (), grads, inputs)
    outputs = backend.forward(inputs, options, keep=True).outputs
    return [*outputs, found.x, found.weight]


def plain_inputs(rows, channels, dtype=FLOAT):
    x, weight, residual = (
        t.detach() for t in make_inputs(rows, channels, dtype=dtype).values()
    )
    return x, weight, residual, (residual.flip(0), x.flip(0))


@pytest.mark.parametrize('channels', [24, 7])
def test_any_strides(channels):
    """Channels next to each other or not, one row for all, a part of a wider tensor."""
    x, weight, residual, grads = plain_inputs(9, channels)
    forms = [
        lambda t: t.mT.contiguous().mT,
        lambda t: F.pad(t, (4, 4))[..., 4:-4],
        lambda t: F.pad(t, (1, 0))[..., 1:],
        lambda t: t[:1].expand(9, -1),
        lambda t: t[:, :1].expand(-1, channels),
    ]
    for form in forms:
        like = [form(t) for t in (x, residual, *grads)]
        results = [
            computed(x, weight, residual, grads)
            for x, residual, *grads in (like, [t.contiguous() for t in like])
        ]
        # Other widths of loads add up in another order.
        for got, want in zip(*results):
            assert relative_error(got, want) < 3e-7


def test_rows_far_apart(tmp_path):
    """Offsets beyond 2^31 elements; the file has holes and takes no room."""
    x, weight, residual, grads = plain_inputs(3, 8, BF16)
    far = torch.from_file(
        str(tmp_path / 'far'), shared=True, size=2**33 + 8, dtype=BF16
    ).as_strided(x.shape, (2**32, 1))
    far.copy_(x)
    got, want = (computed(t, weight, residual, grads) for t in (far, x))
    assert all(map(torch.equal, got, want))


def test_sizes_are_no_constants():
    """Rows of as many channels need the same kernels, and fill a GPU."""
    with kernels.recording(132) as launches:
        for rows in (1, 197, 128 * 197, 2**31 + 5):
            x, weight, residual, grads = plain_inputs(1, 384)
            big = [t.to('meta').expand(rows, -1) for t in (x, residual, *grads)]
            computed(big[0], weight, big[1], big[2:])
    assert len({launch.binary for launch in launches}) == 2
    warps = [launch.grid * launch.threads // 32 for launch in launches]
    # Of so many rows as 128 images have.
    assert min(warps[4:6]) >= 132 * 8


def in_guarded_memory(at_end):
    for shape in [(3, 20), (3, 7), (1, 3076)]:
        x, weight, residual, grads = plain_inputs(*shape)
        x, weight, residual, *grads = (
            guarded(t, at_end) for t in (x, weight, residual, *grads)
        )
        computed(x, weight, residual, grads)


def test_nothing_outside_is_read():
    assert stays_inside(in_guarded_memory)


# Races


def of_short_rows():
    return computed(*plain_inputs(40, 64))


def of_rows_of_several_warps():
    return computed(*plain_inputs(9, 400))


def of_long_rows():
    return computed(*plain_inputs(2, 3076))


@pytest.mark.parametrize(
    'results', [of_short_rows, of_rows_of_several_warps, of_long_rows]
)
def test_every_order_gives_the_same_bits(results):
    assert not differs_in_some_order(results)


@pytest.mark.parametrize('barrier', BARRIERS)
def test_no_barrier_can_be_left_out(barrier):
    assert fails_without(barrier, of_rows_of_several_warps)


def test_all_barriers_are_tested():
    source = (kernels.Kernel('add_norm.cu', '').path).read_text()
    assert source.count('sync_cta("') + source.count('sync_warp("') == len(BARRIERS)
    assert all(f'("{barrier}")' in source for barrier in BARRIERS)
