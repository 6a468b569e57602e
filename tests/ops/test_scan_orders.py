"""Scan orders: their tables, and the scan along each of them on every backend."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvssm.ops import (
    cross_merge,
    cross_scan,
    list_scan_orders,
    register_scan_order,
    scan_order,
    ss2d_scan,
)
from mmvssm.ops.cpu import library
from mmvssm.ops.scan_orders import kernel_orders
from mmvssm.ops.scan_orders.gather import merge_orders, read_orders
from parity import Case

from .backends_under_test import (
    BACKENDS,
    FAST_BACKENDS,
    on_backends,
    on_every_isa,
    precision,
)
from .scan_inputs import gradients
from .scan_order_inputs import compare, order_inputs

NAMES = [
    *('bidi', 'corners', 'cross', 'diagonals', 'hilbert', 'spiral', 'unidi'),
    *('windows2', 'windows7', 'zigzag'),
]
SIZES = [(5, 7), (1, 6), (6, 1), (4, 4)]
DOCS = Path(__file__).parents[2] / 'docs' / 'scan_orders.md'
CPU = torch.device('cpu')
names = pytest.mark.parametrize('name', NAMES)
backends = on_backends(*BACKENDS)


def shuffled(height, width):
    """Two rows of no pattern, padded in front, in the middle and at the end."""
    places = torch.randperm(
        height * width, generator=torch.Generator().manual_seed(0)
    ).tolist()
    half = len(places) // 2
    return [
        [*places, -1, -1, -1],
        [-1, *places[half:], -1, *places[:half], -1],
    ]


def spelled(orders):
    """The orders in the name of a test."""
    if isinstance(orders, list):
        return '+'.join(map(spelled, orders))
    return getattr(orders, '__name__', str(orders))


def check(orders, shape, backend, **options):
    """Compare a backend with the definition, in the widest dtype that it takes."""
    dtype, tolerance = precision(backend)
    inputs = order_inputs(orders, shape, dtype=dtype, **options)
    compare(inputs, orders, backend, tolerance)


# The tables


def test_names():
    assert NAMES == [name for name in list_scan_orders() if name in NAMES]


@names
@pytest.mark.parametrize('size', [*SIZES, (1, 1), (8, 9), (14, 14), (7, 2)])
def test_every_row_has_every_place_once(name, size):
    table = scan_order(name, *size)
    assert table.dtype == torch.int64 and table.device == CPU
    window = {'windows2': 2, 'windows7': 7}.get(name, 1)
    height, width = (-(-side // window) * window for side in size)
    assert table.shape == (4, height * width)
    places = torch.arange(size[0] * size[1])
    for row in table:
        assert torch.equal(row[row >= 0].sort().values, places)
        assert (row >= -1).all()


ROWS_2_BY_3 = {
    'cross': ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]),
    'unidi': ([0, 1, 2, 3, 4, 5],) * 4,
    'bidi': ([0, 1, 2, 3, 4, 5],) * 2 + ([5, 4, 3, 2, 1, 0],) * 2,
    'corners': (
        *([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]),
        *([2, 1, 0, 5, 4, 3], [3, 4, 5, 0, 1, 2]),
    ),
    'zigzag': (
        *([0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0]),
        *([0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]),
    ),
    'windows2': ([0, 1, 3, 4, 2, -1, 5, -1], [0, 3, 1, 4, 2, 5, -1, -1]),
    'diagonals': ([0, 4, 1, 5, 2, 3], [0, 5, 1, 3, 2, 4]),
    'spiral': ([0, 1, 2, 5, 4, 3], [5, 4, 3, 0, 1, 2]),
    'hilbert': ([0, 3, 4, 5, 2, 1], [0, 1, 2, 5, 4, 3]),
}


@pytest.mark.parametrize('name', ROWS_2_BY_3)
def test_rows_by_hand(name):
    rows = [*ROWS_2_BY_3[name]]
    if len(rows) == 2:
        rows += [row[::-1] for row in rows]
    assert scan_order(name, 2, 3).tolist() == rows


def test_windows_by_rows_and_by_columns():
    rows, columns, *reverses = scan_order('windows2', 4, 4)
    assert rows.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(columns, rows % 4 * 4 + rows // 4)
    assert [row.tolist() for row in reverses] == [
        row.flip(0).tolist() for row in (rows, columns)
    ]


@names
@pytest.mark.parametrize('size', SIZES)
def test_reverses(name, size):
    """Two of the four rows are the others from the end."""
    a, b, c, d = scan_order(name, *size)
    pairs = ((a, b), (c, d)) if name in ('corners', 'zigzag') else ((a, c), (b, d))
    if name != 'unidi':
        assert all(torch.equal(first.flip(0), second) for first, second in pairs)


@pytest.mark.parametrize('name', ['hilbert', 'spiral', 'zigzag'])
@pytest.mark.parametrize('size', [*itertools.product(range(1, 11), repeat=2)])
def test_steps_to_a_neighbour(name, size):
    """All but one diagonal step of a Hilbert curve of odd length and even breadth."""
    for k, row in enumerate(scan_order(name, *size)):
        place = torch.stack((row // size[1], row % size[1]), dim=1)
        steps = place.diff(dim=0).abs()
        longer = steps.sum(1) != 1
        breadth, length = size if k % 2 == 0 else size[::-1]
        diagonal = name == 'hilbert' and length % 2 and breadth % 2 == 0
        assert int(longer.sum()) == int(diagonal and length > 1 and breadth > 2)
        assert (steps[longer] == 1).all()


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_hilbert_on_powers_of_two(order):
    """As Hilbert's curve is defined: four copies, the outer two turned."""
    curve = torch.zeros(1, 2, dtype=torch.int64)
    for n in (2**k for k in range(order)):
        turned = n - 1 - curve.flip(1)
        curve = torch.cat(
            (
                curve.flip(1),
                curve + torch.tensor([n, 0]),
                curve + torch.tensor([n, n]),
                turned + torch.tensor([0, n]),
            )
        )
    side = 2**order
    assert torch.equal(
        scan_order('hilbert', side, side)[0], curve @ torch.tensor([side, 1])
    )


def test_hilbert_is_transposed():
    first, second, *_ = scan_order('hilbert', 6, 9)
    other = scan_order('hilbert', 9, 6)[0]
    assert torch.equal(second, other % 6 * 9 + other // 6)
    assert not torch.equal(first, second)


def test_zigzag_is_the_published_one():
    case = Case('op_zigzag_orders')
    for height, width in case.arguments['hw']:
        for k, row in enumerate(scan_order('zigzag', height, width)):
            published = case._numbers[f'order{k}_{height}x{width}']
            np.testing.assert_array_equal(row.numpy(), published)


@pytest.mark.parametrize('size', [*SIZES, (1, 1)])
def test_cross_is_cross_scan(size):
    places = torch.arange(size[0] * size[1]).view(1, 1, *size)
    assert torch.equal(scan_order('cross', *size), cross_scan(places)[0, :, 0])


def test_routes_are_recognised():
    """Rows that kernels walk without a table, whatever order they come from."""
    found = {name: kernel_orders(name, 3, 4, CPU) for name in NAMES}
    assert found['cross'] == ((0, 1, 2, 3), None)
    assert found['unidi'] == ((0, 0, 0, 0), None)
    assert found['bidi'] == ((0, 0, 2, 2), None)
    assert found['corners'].routes == (0, 2, -1, -1)
    assert found['spiral'].routes == (-1,) * 4
    # With padding behind the end, which has no effect, and not with any before.
    both = kernel_orders(['unidi', 'windows2', lambda h, w: [range(-1, 12)]], 3, 4, CPU)
    assert both.routes == (0, 0, 0, 0, -1, -1, -1, -1, -1)
    assert both.table.dtype == torch.int32
    assert torch.equal(
        both.table[:8, 12:16].long(), scan_order(['unidi', 'windows2'], 3, 4)[:, 12:]
    )


# Several orders, and orders of one's own


def test_several_orders():
    table = scan_order(['unidi', shuffled, 'windows2'], 3, 3)
    assert table.shape == (4 + 2 + 4, 16)
    assert torch.equal(table[:4, :9], scan_order('unidi', 3, 3))
    assert (table[:4, 9:] == -1).all()
    assert torch.equal(table[4:6, :12], torch.tensor(shuffled(3, 3)))
    assert torch.equal(table[6:], scan_order('windows2', 3, 3))
    assert torch.equal(scan_order(('cross',), 3, 3), scan_order('cross', 3, 3))


def test_a_table_is_the_caller_s_own():
    scan_order('spiral', 3, 3).zero_()
    assert scan_order('spiral', 3, 3).max() == 8


BAD = {
    'no tensor': (None, 'expected a table .* of integers'),
    'lists of several lengths': ([[0, 1], [0]], 'lists of one length'),
    'floats': (torch.zeros(1, 6), 'integers with L >= 6, got torch.float32'),
    'booleans': (torch.zeros(1, 6, dtype=torch.bool), 'got torch.bool'),
    'one row': (torch.arange(6), r'got torch.int64 \(6,\)'),
    'no row': (torch.zeros(0, 6, dtype=torch.int64), r'\(0, 6\)'),
    'too short': ([[0, 1, 2, 3, 4]], r'L >= 6, got torch.int64 \(1, 5\)'),
    'twice': ([[0, 1, 2, 3, 4, 4]], 'in row 0 missing: 5; repeated: 4$'),
    'out of range': ([range(6), [0, 1, 2, 3, 4, 6]], 'in row 1 .*no place: 6$'),
    'below -1': ([[0, 1, 2, 3, 4, 5, -2]], 'no place: -2$'),
    'padding for a place': ([[0, 1, 2, 3, 4, -1]], 'missing: 5$'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_tables_are_refused(case):
    rows, message = BAD[case]

    def odd(height, width):
        return rows

    with pytest.raises(ValueError, match=f"'odd' on a map of 2 x 3: .*{message}"):
        scan_order(odd, 2, 3)


def test_bad_names_are_refused():
    inputs = order_inputs('cross', (1, 4, 2, 3))
    for run in (scan_order, lambda orders, *_: ss2d_scan(**inputs, orders=orders)):
        with pytest.raises(ValueError, match=r"no scan order 'cros'; there are \['"):
            run('cros', 2, 3)
        with pytest.raises(ValueError, match='list of scan orders is empty'):
            run([], 2, 3)
        with pytest.raises(TypeError, match='not int'):
            run(4, 2, 3)
    with pytest.raises(ValueError, match='map of 0 x 3 has no places'):
        scan_order('cross', 0, 3)
    with pytest.raises(ValueError, match="a scan order 'cross' already"):
        register_scan_order('cross')(shuffled)
    with pytest.raises(ValueError, match='must be a word'):
        register_scan_order(shuffled)


def test_number_of_parameters_is_checked():
    with pytest.raises(ValueError, match=r'x_proj_weight must be \(8, 4, 4\) for 8'):
        ss2d_scan(**order_inputs('cross', (1, 4, 2, 3)), orders=['cross', 'spiral'])


# The scan


@backends
@pytest.mark.parametrize('size', SIZES)
@names
def test_matches_the_definition(name, size, backend):
    check(name, (2, 5, *size), backend)


@backends
@pytest.mark.parametrize(
    'orders', [shuffled, ['cross', 'windows2'], ['hilbert', shuffled]], ids=spelled
)
def test_any_number_of_orders(orders, backend):
    """Padding in front, between and behind; rows with and without a table."""
    check(orders, (1, 3, 2, 3), backend, states=2)


@backends
def test_order_of_one_s_own(backend):
    if 'tests: outwards' not in list_scan_orders():

        @register_scan_order('tests: outwards')
        def outwards(height, width):
            distance = torch.arange(height * width) - height * width // 2
            return distance.abs().argsort(stable=True)[None]

    check('tests: outwards', (1, 4, 3, 4), backend)
    check(['tests: outwards'] * 2, (1, 4, 3, 4), backend)


@backends
def test_strides(backend):
    layouts = {
        'channels last': (0, 2, 3, 1),
        'transposed': (3, 2, 1, 0),
        'batch last': (1, 2, 3, 0),
    }
    for axes in layouts.values():
        dtype, tolerance = precision(backend)
        inputs = order_inputs('windows2', (2, 3, 3, 2), dtype=dtype)
        x = inputs['x'].detach().permute(axes).contiguous()
        inputs['x'] = x.permute([*map(axes.index, range(4))]).requires_grad_()
        compare(inputs, 'windows2', backend, tolerance)


@on_every_isa()
@pytest.mark.parametrize('states', [1, 3, 16])
@pytest.mark.parametrize('channels', [1, 16, 34, 96])
@pytest.mark.parametrize(
    'orders', ['hilbert', ['windows7', shuffled, 'bidi']], ids=spelled
)
def test_compiled_kernels(isa, orders, channels, states):
    """Several chunks; channel blocks that are full, and that are not."""
    shape = (2, channels, 9, 11)
    with library.use_isa(isa):
        check(orders, shape, 'cpu', rank=3, states=states)


def test_a_padded_place_lets_the_state_decay():
    """By exp(softplus(bias) A), as the map's own zeros do with B = C = 0."""

    def padded(height, width):
        return [[0, -1, -1, 1]]

    one = torch.ones(1, 1, 1)
    inputs = dict(
        x=torch.tensor([[[[1.0, 1.0]]]]),
        x_proj_weight=torch.tensor([[[0.0], [1.0], [1.0]]]),
        dt_projs_weight=one,
        dt_projs_bias=one[0],
        A=-one[0],
        Ds=torch.zeros(1),
    )
    dt = torch.nn.functional.softplus(one)
    y = ss2d_scan(**inputs, orders=padded)
    torch.testing.assert_close(y[..., :1], one[None] * dt)
    torch.testing.assert_close(y[..., 1:], one[None] * (dt * torch.exp(-3 * dt) + dt))


@on_backends(*FAST_BACKENDS)
def test_nan_is_refused(backend):
    inputs = order_inputs('windows2', (1, 3, 3, 3), dtype=torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs['dt_projs_bias'][2, 1] = float('nan')
    with pytest.raises(ValueError, match='are NaN'):
        ss2d_scan(**inputs, orders='windows2', backend=backend)


THREADS = (1, 2, 3, 4, 7)


@on_backends(*FAST_BACKENDS)
@pytest.mark.parametrize('orders', ['windows7', 'hilbert'])
def test_same_bits_at_any_number_of_threads(set_threads, orders, backend):
    inputs = order_inputs(orders, (2, 40, 33, 30), rank=3, dtype=torch.float32)
    results = []
    for threads in THREADS:
        set_threads(threads)
        y = ss2d_scan(**inputs, orders=orders, backend=backend)
        results.append([y, *gradients((y,), inputs).values()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    assert not any(x.isnan().any() for x in results[0])


@backends
@pytest.mark.parametrize('orders', ['unidi', 'windows2'])
def test_compile_fullgraph(backend, orders):
    inputs = order_inputs(orders, (1, 4, 3, 2), dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ss2d_scan, fullgraph=True, backend='aot_eager')
    options = dict(orders=orders, backend=backend)
    got, want = (f(**inputs, **options) for f in (compiled, ss2d_scan))
    torch.testing.assert_close(got, want)
    got, want = gradients((got,), inputs), gradients((want,), inputs)
    torch.testing.assert_close(got, want)


@on_backends(*FAST_BACKENDS)
def test_compile_for_several_sizes(backend):
    """Each size has its own table; the second one would be symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(ss2d_scan, fullgraph=True, backend='eager')
    options = dict(orders='spiral', backend=backend)
    for size in ((3, 2), (2, 5), (4, 3)):
        inputs = order_inputs('spiral', (1, 4, *size), dtype=torch.float32)
        got, want = (f(**inputs, **options) for f in (compiled, ss2d_scan))
        torch.testing.assert_close(got, want)


@on_backends(*FAST_BACKENDS)
@pytest.mark.parametrize('strict', [False, True])
def test_export(backend, strict):
    inputs = order_inputs('windows2', (1, 4, 3, 2), dtype=torch.float32)
    x = inputs.pop('x').detach()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterDict(inputs)

        def forward(self, x):
            return ss2d_scan(x, **self.weights, orders='windows2', backend=backend)

    exported = torch.export.export(Layer(), (x,), strict=strict).module()
    assert torch.equal(exported(x), Layer()(x))


@on_backends(*FAST_BACKENDS)
@pytest.mark.parametrize('fake', [False, True], ids=['inference', 'fake'])
def test_tables_outlive_the_mode_they_were_made_in(fake, backend):
    """A table first asked for in inference, or of fake tensors, serves training."""

    def order(height, width):
        return torch.arange(height * width).flip(0)[None].roll(1)

    inputs = order_inputs(order, (1, 4, 2, 1), dtype=torch.float32)
    size = (1, 4, 3, 5)
    inputs['x'] = torch.randn(size, requires_grad=True)
    if fake:
        with FakeTensorMode() as mode:
            faked = {name: mode.from_tensor(x) for name, x in inputs.items()}
            assert ss2d_scan(**faked, orders=order, backend=backend).shape == size
    else:
        with torch.inference_mode():
            ss2d_scan(**inputs, orders=order, backend=backend)
    y = ss2d_scan(**inputs, orders=order, backend=backend)
    assert type(y) is torch.Tensor
    gradients((y,), inputs)


def test_shapes_on_the_meta_device():
    inputs = order_inputs('windows7', (1, 8, 5, 6), dtype=torch.float32)
    inputs = {name: x.to('meta') for name, x in inputs.items()}
    assert ss2d_scan(**inputs, orders='windows7').shape == (1, 8, 5, 6)


# Reading and merging


def test_reading_and_merging_are_adjoint():
    orders = ['windows2', shuffled]
    maps = torch.randn(6, 2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    read = read_orders(maps.unbind(), orders)
    ys = torch.randn_like(read, requires_grad=True)
    (read * ys).sum().backward()
    sequences = ys.permute(0, 2, 3, 1)
    merged = merge_orders(sequences, orders, (3, 4))
    torch.testing.assert_close(maps.grad.sum(0).flatten(1, 2).mT, merged)
    assert torch.equal(
        read_orders(maps.unbind()[:4], 'cross').permute(0, 2, 3, 1)[:, 1],
        cross_scan(maps[1].permute(0, 3, 1, 2))[:, 1],
    )
    ys = torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(
        merge_orders(ys, 'cross', (3, 4)), cross_merge(ys, (3, 4))
    )


def test_second_derivatives():
    orders, size = ['spiral', 'windows2'], (2, 3)
    ys = torch.randn(1, 8, 2, 8, dtype=torch.float64, requires_grad=True)

    def function(ys):
        merged = merge_orders(ys, orders, size).mT.view(1, *size, 2)
        return read_orders([merged**2] * 8, orders)

    assert torch.autograd.gradcheck(function, ys)
    assert torch.autograd.gradgradcheck(function, ys)


# The docs


def test_example_of_the_docs():
    """Its code runs, and shows what it says."""
    (code,) = re.findall(r'```python\n(.*?)```', DOCS.read_text(), re.DOTALL)
    shown = {}
    exec(code, shown)
    assert shown['y'].shape == shown['x'].shape
    table = scan_order('antidiagonals', 2, 3)
    assert table[0].tolist() == [0, 1, 3, 2, 4, 5]


def test_docs_list_every_order():
    rows = re.findall(r'^\|([^|]*)\|', DOCS.read_text(), re.MULTILINE)
    listed = set(re.findall(r'`(\w+)`', ' '.join(rows)))
    assert listed == set(NAMES)
