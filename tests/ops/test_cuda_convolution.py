"""The CUDA kernels of the bidirectional scan's convolutions, emulated on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.convolution import convolve, convolve_backward

from .cuda_emulation import AVAILABLE, Emulator
from .cuda_emulation.guarded import guarded, stays_inside
from .cuda_emulation.orders import differs_in_some_order, fails_without
from .scan_inputs import relative_error

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
BARRIERS = ('rows', 'rows are read', 'sums of the warps')


class Wide(Emulator):
    """A GPU of many multiprocessors, to which a sequence is shared out."""

    def multiprocessors(self, on):
        return 1000


def make_inputs(batch, length, channels, taps, dtypes=(FLOAT, FLOAT, FLOAT)):
    """The sequence, the weights and two terms of each result's gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=FLOAT):
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [
        Direction(normal(channels, taps), normal(channels), *[None] * 5)
        for _ in range(2)
    ]
    x, *grads = (normal(5, batch, length, channels, dtype=d) for d in dtypes)
    return x[0], weights, [(grads[0][i], grads[1][i]) for i in range(2)]


def definition(x, weights, from_end):
    taps = weights.conv_weight.shape[1]
    x = x.flip(1) if from_end else x
    y = F.conv1d(
        F.pad(x.mT, (taps - 1, 0)),
        weights.conv_weight[:, None],
        weights.conv_bias,
        groups=x.shape[2],
    ).mT
    return F.silu(y.flip(1) if from_end else y)


def names():
    return ['u', "u'", 'x', 'weight', 'bias', "weight'", "bias'"]


def computed(x, weights, grads):
    grad_x, by_weights = convolve_backward(x, weights, grads)
    return [*convolve(x, weights), grad_x, *by_weights[0], *by_weights[1]]


def wanted(x, weights, grads):
    """The same in float64, by torch's own gradients."""
    leaves = [x, *(t for w in weights for t in w[:2])]
    x, *rest = leaves = [t.double().requires_grad_() for t in leaves]
    directions = [Direction(*rest[2 * i : 2 * i + 2], *[None] * 5) for i in range(2)]
    us = [definition(x, direction, bool(i)) for i, direction in enumerate(directions)]
    by = torch.autograd.grad(us, leaves, [a.double() + b.double() for a, b in grads])
    return [*us, *by]


def errors(inputs):
    got, want = computed(*inputs), wanted(*inputs)
    return {
        name: relative_error(x, y)
        for name, x, y in zip(names(), got, want, strict=True)
    }


@pytest.mark.parametrize(
    'shape',
    [
        (2, 37, 24, 4),
        (1, 140, 136, 4),  # more channels than a warp has, and several runs
        (1, 1, 8, 4),
        (3, 2, 5, 4),  # a sequence shorter than the convolution
        (1, 3, 70, 8),
        (1, 90, 33, 5),
        (2, 20, 17, 2),
        (1, 9, 8, 1),
    ],
)
def test_matches_the_definition(shape):
    found = errors(make_inputs(*shape))
    assert all(error < 2e-6 for error in found.values()), found


@pytest.mark.parametrize(
    'dtypes', [(BF16, BF16, BF16), (HALF, HALF, FLOAT), (FLOAT, FLOAT, BF16)], ids=str
)
def test_dtypes(dtypes):
    """Results in that of x, rounded once; gradients of weights are float32."""
    inputs = make_inputs(2, 21, 24, 4, dtypes)
    found = errors(inputs)
    of_weights = {name: found.pop(name) for name in names()[3:]}
    assert all(error < 2e-6 for error in of_weights.values()), of_weights
    rounding = max(torch.finfo(dtypes[0]).eps / 2, 2e-6)
    assert all(error < rounding for error in found.values()), found
    for got, want in zip(computed(*inputs), [dtypes[0]] * 3 + [FLOAT] * 4):
        assert got.dtype == want


def test_weights_that_are_no_contiguous_float32():
    x, weights, grads = make_inputs(1, 9, 8, 4)
    weights = [w._replace(conv_bias=w.conv_bias.double()) for w in weights]
    weights[0] = weights[0]._replace(conv_weight=weights[0].conv_weight.mT.clone().mT)
    found = errors((x, weights, grads))
    assert all(error < 2e-6 for error in found.values()), found


@pytest.mark.parametrize('channels', [24, 17])
def test_any_strides(channels):
    """Channels last or first, a part of a wider tensor, one batch element for all."""
    x, weights, grads = make_inputs(2, 11, channels, 4)
    forms = [
        lambda t: t.mT.contiguous().mT,
        lambda t: F.pad(t, (8, 16))[..., 8:-16],
        lambda t: F.pad(t, (1, 2))[..., 1:-2],
        lambda t: t[:1].expand(2, -1, -1),
        lambda t: t[:, :1].expand(-1, 11, -1),
        lambda t: t[..., :1].expand(-1, -1, channels),
    ]
    for form in forms:
        like = [form(t) for t in (x, *grads[0], *grads[1])]
        plain = [t.contiguous() for t in like]
        results = [
            computed(x, weights, [(a, b), (c, d)]) for x, a, b, c, d in (like, plain)
        ]
        assert all(torch.equal(*pair) for pair in zip(*results))


def test_gradients_of_weights_are_as_the_op_says():
    x, weights, grads = make_inputs(1, 5, 3, 4)
    _, found = convolve_backward(x, weights, grads)
    for by_weight, by_bias in found:
        assert by_weight.shape == (3, 4) and by_weight.is_contiguous()
        assert by_bias.shape == (3,) and by_bias.is_contiguous()
    tensors = [t for pair in found for t in pair]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 4


def test_shorter_runs_give_the_same_bits():
    inputs = make_inputs(2, 150, 24, 4)
    few = computed(*inputs)
    with kernels.use_machine(Wide()):
        many = computed(*inputs)
        with kernels.recording(1000) as launches:
            computed(*inputs)
    assert launches[0].args.shape.runs > 15
    for name, x, y in zip(names(), few, many):
        # Sums over positions are made of other parts.
        assert torch.equal(x, y) or name in names()[3:], name
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize('shape', [(0, 4, 3), (2, 0, 3)])
def test_nothing(shape):
    x, weights, grads = make_inputs(*shape, 4)
    us, (grad_x, found) = convolve(x, weights), convolve_backward(x, weights, grads)
    assert [u.shape for u in us] == [shape] * 2 and grad_x.shape == shape
    assert all(not t.any() and len(t) == shape[2] for pair in found for t in pair)


def test_rows_far_apart(tmp_path):
    """Offsets beyond 2^31 elements; the file has holes and takes no room."""
    x, weights, grads = make_inputs(2, 3, 8, 4, (BF16,) * 3)
    strides = (2**32, 2**30, 1)
    far = torch.from_file(
        str(tmp_path / 'far'), shared=True, size=2**32 + 2**31 + 8, dtype=BF16
    ).as_strided(x.shape, strides)
    far.copy_(x)
    assert all(map(torch.equal, convolve(far, weights), convolve(x, weights)))
    got = convolve_backward(far, weights, grads)
    assert torch.equal(got[0], convolve_backward(x, weights, grads)[0])
    far.copy_(grads[0][0])
    again = convolve_backward(x, weights, [(far, grads[0][1]), grads[1]])
    assert torch.equal(again[0], got[0])


def test_sizes_are_no_constants():
    """Few kernels are compiled for many sizes, and a GPU is filled by one sequence."""
    with kernels.recording(132) as launches:
        for batch, length, channels in [(1, 197, 384), (128, 197, 768), (3, 6085, 70)]:
            x, weights, grads = make_inputs(1, 1, 1, 4)
            shape = batch, length, channels
            x, *grads = (t.to('meta').expand(shape) for t in (x, *grads[0], *grads[1]))
            weights = [
                Direction(torch.empty(channels, 4), torch.empty(channels), *w[2:])
                for w in weights
            ]
            convolve(x, weights)
            convolve_backward(x, weights, [grads[:2], grads[2:]])
    assert len({launch.binary for launch in launches}) == 2
    for launch in launches:
        assert launch.shared * (512 // launch.threads) <= 227 * 1024
    one = next(x for x in launches if x.args.shape.length == 6085)
    assert one.grid * one.threads // 32 >= 132 * 8


def test_too_long():
    x, weights, _ = make_inputs(1, 1, 8, 4)
    with kernels.recording(), pytest.raises(ValueError, match='counts to 2\\^30'):
        convolve(x.to('meta').expand(1, 2**30, 8), weights)


def in_guarded_memory(at_end):
    for shape in [(1, 20, 40, 4), (2, 3, 8, 5)]:
        x, weights, grads = make_inputs(*shape)
        x, *grads = (guarded(t, at_end) for t in (x, *grads[0], *grads[1]))
        weights = [
            Direction(*(guarded(t, at_end) for t in w[:2]), *w[2:]) for w in weights
        ]
        computed(x, weights, [grads[:2], grads[2:]])


def test_nothing_outside_is_read():
    assert stays_inside(in_guarded_memory)


# Races


def of_many_warps():
    return computed(*make_inputs(2, 30, 70, 4, (BF16, BF16, FLOAT)))


def test_every_order_gives_the_same_bits():
    assert not differs_in_some_order(of_many_warps)


@pytest.mark.parametrize('barrier', BARRIERS)
def test_no_barrier_can_be_left_out(barrier):
    assert fails_without(barrier, of_many_warps)


def test_all_barriers_are_tested():
    source = (kernels.Kernel('convolution.cu', '').path).read_text()
    assert source.count('sync_cta("') + source.count('sync_warp("') == len(BARRIERS)
    assert all(f'("{barrier}")' in source for barrier in BARRIERS)
