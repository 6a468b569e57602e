import pytest
import torch

from mmvssm.ops import cross_merge, cross_scan


def test_routes_of_a_small_map():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert cross_scan(x)[0, :, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


@pytest.mark.parametrize('size', [(4, 5), (1, 7), (6, 1), (1, 1)])
def test_merge_puts_every_position_back(size):
    x = torch.randn(2, 3, *size)
    merged = cross_merge(cross_scan(x), size)
    torch.testing.assert_close(merged, 4 * x.flatten(2))


def test_merge_is_the_adjoint_of_scan():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    ys = torch.randn(2, 4, 3, 20, dtype=torch.float64)
    (cross_scan(x) * ys).sum().backward()
    torch.testing.assert_close(x.grad.flatten(2), cross_merge(ys, (4, 5)))


def test_strides_do_not_matter():
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(cross_scan(x), cross_scan(last))
    ys = torch.randn(2, 4, 3, 20)
    assert torch.equal(
        cross_merge(ys, (4, 5)), cross_merge(ys.mT.contiguous().mT, (4, 5))
    )


def test_gradcheck():
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_scan, x)
    ys = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: cross_merge(y, (3, 2)), ys)


@pytest.mark.parametrize('shape', [(3, 4, 5), (1, 3, 0, 5)])
def test_bad_map(shape):
    with pytest.raises(ValueError, match='cross_scan: expected a map'):
        cross_scan(torch.zeros(shape))


@pytest.mark.parametrize(
    'shape,size',
    [((1, 4, 3, 20), (4, 4)), ((1, 3, 3, 20), (4, 5)), ((4, 3, 20), (4, 5))],
)
def test_bad_sequences(shape, size):
    with pytest.raises(ValueError, match='cross_merge: expected'):
        cross_merge(torch.zeros(shape), size)
