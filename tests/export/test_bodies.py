"""The bodies of our ops in standard operators, each op alone, in two runtimes.

A new op needs a case in CASES. If its body has control flow, it also needs a case in
FIXED that ``test_without_control_flow`` takes.
"""

from functools import partial

import pytest
import torch

from export.runtimes import (
    exported,
    inlined,
    nodes_of,
    run_onnxruntime,
    run_openvino,
)
from mmvssm import ops
from mmvssm.export import ExportError
from mmvssm.export.verify import has_kernels
from mmvssm.layers import rotary_tables
from mmvssm.ops import Direction
from mmvssm.ops.operator import public_ops
from ops.bidirectional_inputs import WAYS
from ops.bidirectional_inputs import make_inputs as bidirectional_inputs
from ops.scan_inputs import scan_inputs, ss2d_inputs

CONTROL_FLOW = {'Scan', 'Loop', 'If'}


def largest_error(got, want):
    """Largest difference in a channel, relative to the channel's largest value.

    Infinite with NaN or another shape. Channels are the second axis.
    """
    if got.shape != want.shape or not got.isfinite().all():
        return float('inf')
    difference, size = (
        x.transpose(0, 1).flatten(1).abs().amax(1) for x in (got - want, want)
    )
    return float((difference / size.clamp(min=1e-300)).max())


def bidirectional_scan(x, z, average=False, **weights):
    directions = [
        Direction(*(weights[f'{way}.{name}'] for name in Direction._fields))
        for way in WAYS
    ]
    return ops.bidirectional_scan(x, z, *directions, average=average)


def linear_attention(q, k, v, cos=None, sin=None, **options):
    rotary = None if cos is None else (cos, sin)
    return ops.linear_attention(q, k, v, rotary=rotary, **options)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class Case:
    """A call with sizes.

    Args:
        function: Calls the op.
        make: Makes all tensors by name, from sizes.
        sizes: The sizes of the example, then those that are run, too.
        dynamic: The dynamic axes by input.
        inputs: Names of the tensors that are inputs of the model.
    """

    def __init__(self, function, make, *sizes, inputs, dynamic=None):
        self.function, self.make, self.sizes = function, make, sizes
        self.inputs, self.dynamic = inputs, dynamic

    def split(self, sizes):
        tensors = {name: x.detach() for name, x in self.make(*sizes).items()}
        inputs = {name: tensors.pop(name) for name in self.inputs}
        return inputs, tensors

    def export(self, form):
        return exported(
            self.function, *self.split(self.sizes[0]), form, dynamic=self.dynamic
        )

    def runs(self):
        """Inputs of every size, and the outputs in float64 by the reference."""
        _, weights = self.split(self.sizes[0])
        for sizes in self.sizes:
            inputs, _ = self.split(sizes)
            with ops.use_backend('reference'):
                want = self.function(**inputs, **weights)
            yield inputs, want if isinstance(want, tuple) else (want,)


def ss2d(batch, height, width, states, channels=6, rank=2):
    return ss2d_inputs(batch, channels, height, width, rank, states)


def ss2d_twice(batch, height, width, states):
    """Eight scans."""
    made = ss2d(batch, height, width, states)
    x = made.pop('x')
    return dict(x=x) | {name: torch.cat((w, w.flip(0))) for name, w in made.items()}


def bidirectional(batch, length, states, taps=4, other_taps=4):
    made = bidirectional_inputs(batch, 5, length, 2, states, taps)
    if other_taps != taps:
        made['backward.conv_weight'] = made['backward.conv_weight'][:, :other_taps]
    return made


def selective(batch, length, states, groups, optional=('D', 'z', 'delta_bias')):
    return scan_inputs(batch, 6, length, states, groups, optional=optional)


def attention(batch, height, width, channels=8):
    names = ('q', 'k', 'v')
    made = {
        name: 3 * normal(batch, height * width, channels, seed=seed)
        for seed, name in enumerate(names)
    }
    made['cos'], made['sin'] = rotary_tables(height, width, channels, like=made['q'])
    return made


def norm(batch, length):
    return dict(x=normal(batch, length, 8), residual=normal(batch, length, 8, seed=1))


MAP, SEQUENCE = dict(x=(0, 2, 3)), dict(x=(0, 2), z=(0, 2))
SCANNED = dict(u=(0, 2), delta=(0, 2), B=(0, 3), C=(0, 3), z=(0, 2))
POSITIONS = dict.fromkeys('qkv', (0, 1)) | dict(cos=(0,), sin=(0,))
SIZES = (3, 5, 7), (1, 1, 1), (2, 8, 3)
softplus = partial(ops.selective_scan, delta_softplus=True)
plain_scan = partial(ops.selective_scan, return_last_state=True)


def linear(x, weight, bias=None):
    return ops.linear(x, weight, bias)


def layer(*shape):
    return dict(x=normal(*shape, 8), weight=normal(5, 8), bias=normal(5))


# For each case a dynamic and a fixed size, where the op has a size.
CASES = {
    'ss2d, one state': Case(
        *(ops.ss2d_scan, ss2d, *((*size, 1) for size in SIZES)),
        inputs=('x',),
        dynamic=MAP,
    ),
    'ss2d, 16 states': Case(
        *(ops.ss2d_scan, ss2d, *((*size, 16) for size in SIZES)),
        inputs=('x',),
        dynamic=MAP,
    ),
    'bidirectional': Case(
        *(bidirectional_scan, bidirectional, (3, 7, 16), (1, 1, 16), (2, 12, 16)),
        inputs=('x', 'z'),
        dynamic=SEQUENCE,
    ),
    'selective': Case(
        *(softplus, selective, (3, 7, 3, 2), (1, 1, 3, 2), (2, 12, 3, 2)),
        inputs=('u', 'delta', 'B', 'C', 'z'),
        dynamic=SCANNED,
    ),
    'attention': Case(
        *(partial(linear_attention, heads=2), attention),
        *((3, 3, 5), (1, 1, 1), (2, 2, 4)),
        inputs=('q', 'k', 'v', 'cos', 'sin'),
        dynamic=POSITIONS,
    ),
    'norm': Case(
        lambda weight, **x: ops.add_rms_norm(weight=weight, **x),
        lambda *sizes: norm(*sizes) | dict(weight=normal(8, seed=2)),
        *((3, 7), (1, 1)),
        inputs=('x', 'residual'),
        dynamic=dict(x=(0, 1), residual=(0, 1)),
    ),
    'linear': Case(
        linear, layer, (3, 4), (1, 1), inputs=('x',), dynamic=dict(x=(0, 1))
    ),
    'linear of a matrix': Case(
        linear, layer, (3,), (1,), inputs=('x',), dynamic=dict(x=(0,))
    ),
}
FIXED = {
    'ss2d, one state': Case(ops.ss2d_scan, ss2d, (2, 5, 7, 1), inputs=('x',)),
    'ss2d, three states': Case(ops.ss2d_scan, ss2d, (1, 7, 2, 3), inputs=('x',)),
    'ss2d, 1x1': Case(ops.ss2d_scan, ss2d, (1, 1, 1, 1), inputs=('x',)),
    'ss2d with padded places': Case(
        partial(ops.ss2d_scan, orders='windows2'), ss2d, (2, 5, 7, 1), inputs=('x',)
    ),
    'ss2d, eight scans': Case(
        partial(ops.ss2d_scan, orders=['zigzag', 'windows2']),
        *(ss2d_twice, (2, 5, 3, 2)),
        inputs=('x',),
    ),
    'bidirectional, average': Case(
        partial(bidirectional_scan, average=True),
        *(bidirectional, (2, 17, 2, 3, 2)),
        inputs=('x', 'z'),
    ),
    'selective, fewest inputs': Case(
        *(
            plain_scan,
            lambda *sizes: {
                name: x.abs() if name == 'delta' else x
                for name, x in selective(*sizes, optional=()).items()
            },
        ),
        (2, 23, 3, 3),
        inputs=('u', 'delta', 'B', 'C'),
    ),
    'bidirectional, one state': Case(
        *(bidirectional_scan, bidirectional, (2, 17, 1)), inputs=('x', 'z')
    ),
    'selective, one state': Case(
        *(softplus, selective, (2, 11, 1, 2)), inputs=('u', 'delta', 'B', 'C', 'z')
    ),
    'selective, ungrouped': Case(
        *(softplus, selective, (2, 4, 2, None, ('D',))),
        inputs=('u', 'delta', 'B', 'C'),
    ),
    'attention, plain': Case(
        partial(linear_attention, normalise=False, cos=None, sin=None),
        lambda *sizes: {
            name: x for name, x in attention(*sizes).items() if name in 'qkv'
        },
        (2, 3, 3),
        inputs=('q', 'k', 'v'),
    ),
    'norm, first block': Case(
        lambda weight, **x: ops.add_rms_norm(weight=weight, **x),
        lambda *sizes: dict(x=norm(*sizes)['x'], weight=normal(8, seed=2)),
        (3, 7),
        inputs=('x',),
    ),
}


def check(case, model):
    plain = inlined(model)
    assert not {node.domain for node in nodes_of(plain.graph)} - {''}
    for inputs, want in case.runs():
        found = [
            (run_onnxruntime(model, inputs), 3e-6),
            (run_onnxruntime(plain, inputs), 3e-6),
            (run_openvino(plain, inputs), 1e-3),
        ]
        if has_kernels():
            found.append((run_onnxruntime(model, inputs, kernels=True), 3e-6))
        for got, bound in found:
            assert len(got) == len(want)
            assert max(map(largest_error, got, want)) < bound
    return plain


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_of_any_size(case):
    check(case, case.export('plain'))


@pytest.mark.parametrize('case', FIXED.values(), ids=FIXED)
def test_of_a_fixed_size(case):
    check(case, case.export('plain'))


@pytest.mark.parametrize(
    'name',
    [
        'ss2d, one state',
        'ss2d, 1x1',
        'ss2d, eight scans',
        'bidirectional, average',
        'selective, fewest inputs',
    ],
)
def test_without_control_flow(name):
    case = FIXED[name]
    plain = check(case, case.export('unrolled'))
    assert not {node.op_type for node in nodes_of(plain.graph)} & CONTROL_FLOW


@pytest.mark.parametrize('form', ['plain', 'function', 'unrolled'])
def test_every_public_op_is_translated(form):
    from mmvssm.export import bodies

    public = (getattr(ops, name) for name in ops.__all__)
    wanted = {
        public_ops[function].torch_op for function in public if function in public_ops
    }
    assert set(bodies.translations(form)) == wanted and len(wanted) > 5


def test_nodes_with_different_bodies_in_one_model():
    tensors = selective(2, 5, 1, 2)
    inputs = {name: tensors.pop(name) for name in ('u', 'delta', 'B', 'C', 'z')}

    def several(z, D, **others):
        y = sum(softplus(z=z, D=d, **others) for d in (D, 2 * D))
        return y + softplus(**others)

    model = exported(several, inputs, tensors, 'plain')
    ours = [node.op_type for node in model.graph.node if node.domain]
    # The most frequent one keeps the name that the kernel library knows.
    assert ours == ['SelectiveScan', 'SelectiveScan', 'SelectiveScan_1']
    assert {function.name for function in model.functions} == set(ours)
    with ops.use_backend('reference'):
        want = several(**inputs, **tensors)
    for proto in (model, inlined(model)):
        assert largest_error(run_onnxruntime(proto, inputs)[0], want) < 3e-6


def export_error(case, form='plain', **changes):
    """The error of an export that is refused; torch wraps it."""
    arguments = dict(function=case.function, form=form, dynamic=case.dynamic) | changes
    inputs, weights = case.split(case.sizes[0])
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(inputs=inputs, weights=weights, **arguments)
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, ExportError)
    return str(error)


@pytest.mark.parametrize('name', ['ss2d, one state', 'bidirectional', 'selective'])
def test_positions_of_an_unknown_size_are_not_written_out(name):
    message = export_error(CASES[name], form='unrolled')
    assert 'unrolled' in message and 'fixed size' in message


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_other_dtypes_are_refused(dtype):
    def half(x, **weights):
        x, *matrices = (t.to(dtype) for t in (x, *list(weights.values())[:2]))
        return ops.ss2d_scan(x, *matrices, *list(weights.values())[2:])

    message = export_error(FIXED['ss2d, one state'], function=half)
    assert f'its x is {dtype}' in message and 'float32' in message


def test_autocast_is_refused():
    def under_autocast(**tensors):
        with torch.autocast('cpu'):
            return ops.ss2d_scan(**tensors)

    message = export_error(FIXED['ss2d, one state'], function=under_autocast)
    assert 'projected_dtype is torch.bfloat16' in message and 'autocast' in message
