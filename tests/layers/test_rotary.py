import math

import pytest
import torch

from mmvssm.layers import rotary_angles, rotary_tables, rotate

LIKE = torch.zeros(1, dtype=torch.float64)


def test_angles_by_hand():
    angles = rotary_angles(2, 4, 8, (14, 14), like=LIKE).unflatten(0, (2, 4))
    # Two frequencies an axis, rows first; positions are stretched over 14.
    for row in range(2):
        for column in range(4):
            y, x = row / 2 * 14, column / 4 * 14
            want = [y, y / 100, x, x / 100]
            assert angles[row, column].tolist() == pytest.approx(want)


def test_a_grid_that_is_not_square():
    angles = rotary_angles(3, 5, 4, (3, 10), like=LIKE).unflatten(0, (3, 5))
    assert angles[2, 4].tolist() == pytest.approx([2, 8])


def test_turning_a_pair():
    angle = torch.tensor([[math.pi / 2, 0.0]], dtype=torch.float64)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    turned = rotate(x, angle.cos(), angle.sin())
    assert turned.flatten().tolist() == pytest.approx([-2, 1, 3, 4])


def test_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    angles = rotary_angles(14, 14, 16, (14, 14), like=LIKE)
    a, b = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    a, b = (rotate(t.expand(1, 196, 16), angles.cos(), angles.sin()) for t in (a, b))
    products = (a[0] @ b[0].T).unflatten(0, (14, 14)).unflatten(2, (14, 14))
    want = products[3, 4, 5, 9]
    torch.testing.assert_close(products[7, 6, 9, 11], want)
    assert not torch.allclose(products[7, 6, 9, 12], want)


def test_half_precision_turns_in_float32():
    x = torch.randn(1, 6, 8, dtype=torch.bfloat16)
    angles = rotary_angles(2, 3, 8, (14, 14), like=x)
    assert angles.dtype == torch.float32
    got = rotate(x, angles.cos(), angles.sin())
    assert got.dtype == torch.bfloat16
    want = rotate(x.float(), angles.cos(), angles.sin())
    assert torch.equal(got, want.bfloat16())


def test_angles_are_made_once_a_size():
    rotary_angles.cache_clear()
    first = rotary_angles(3, 5, 8, (14, 14), like=LIKE)
    assert rotary_angles(3, 5, 8, (14, 14), like=LIKE) is first
    assert rotary_angles(5, 3, 8, (14, 14), like=LIKE) is not first


def test_tables_count_positions():
    tables = rotary_tables(2, 4, 8, like=LIKE).unflatten(1, (2, 4))
    for row in range(2):
        for column in range(4):
            want = [row, row / 100, column, column / 100]
            cos, sin = tables[:, row, column].tolist()
            assert cos == pytest.approx([math.cos(angle) for angle in want])
            assert sin == pytest.approx([math.sin(angle) for angle in want])


def test_tables_of_a_long_map_are_exact():
    tables = rotary_tables(1, 4000, 8, like=LIKE.float())
    assert tables.dtype == torch.float32
    position = torch.arange(4000, dtype=torch.float64)
    want = torch.stack((position.cos(), position.sin()))
    assert (tables[:, :, 2] - want).abs().max() < 1e-7


def test_tables_are_made_once_a_size():
    rotary_tables.cache_clear()
    first = rotary_tables(3, 5, 8, like=LIKE)
    with torch.autocast('cpu', torch.bfloat16):
        assert rotary_tables(3, 5, 8, like=LIKE) is first
    assert rotary_tables(5, 3, 8, like=LIKE) is not first
    assert rotary_tables(3, 5, 8, like=LIKE.bfloat16()).dtype == torch.float32


def test_compiled_and_eager_turn_alike():
    torch._dynamo.reset()
    x = torch.randn(2, 6, 8, requires_grad=True)
    cos, sin = rotary_tables(2, 3, 8, like=x)
    compiled = torch.compile(rotate, fullgraph=True, backend='aot_eager')
    got, want = compiled(x, cos, sin), rotate(x, cos, sin)
    torch.testing.assert_close(got, want)
    weights = torch.randn(2, 6, 8)
    got, want = (torch.autograd.grad((y * weights).sum(), x) for y in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('size', [(3, 5), (1, 4000), (130, 57)])
def test_a_graph_needs_no_float64(size):
    """Angles of large positions are as exact as eagerly, computed in float32 alone."""
    like = torch.zeros(1)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for make, options, bound in [
        (rotary_tables, (16,), 2e-7),
        (rotary_angles, (16, (14, 14)), 1e-6),
    ]:
        compiled = torch.compile(make, fullgraph=True, backend=backend)
        got, want = (f(*size, *options, like=like) for f in (compiled, make))
        assert got.dtype == want.dtype and (got - want).abs().max() < bound
    assert len(graphs) == 2
    assert not any('float64' in graph.code for graph in graphs)
