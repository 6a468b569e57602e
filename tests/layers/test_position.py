import pytest
import torch
import torch.nn.functional as F

from mmvssm.layers import position, resize_position


def interpolate(embedding, old, new):
    grid = embedding.unflatten(1, old).movedim(-1, 1)
    grid = F.interpolate(grid, size=new, mode='bicubic', align_corners=False)
    return grid.movedim(1, -1).flatten(1, 2)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize(
    'old,new',
    [
        ((14, 14), (32, 32)),
        ((32, 32), (14, 14)),
        ((14, 14), (6, 10)),
        ((14, 14), (1, 9)),
        ((1, 5), (3, 1)),
        ((14, 14), (14, 15)),
    ],
)
def test_is_bicubic_interpolation(old, new, dtype):
    torch.manual_seed(0)
    double = torch.randn(1, old[0] * old[1], 8).double().requires_grad_()
    embedding = double.detach().to(dtype).requires_grad_()
    got, want = resize_position(embedding, old, new), interpolate(double, old, new)
    assert got.dtype == dtype
    tolerance = 100 * torch.finfo(dtype).eps
    assert (got - want).abs().max() < tolerance
    got, want = (
        torch.autograd.grad(out.square().sum(), leaf)[0]
        for out, leaf in ((got, embedding), (want, double))
    )
    assert (got - want).abs().max() < tolerance * want.abs().max()


def test_same_size_is_left_alone():
    embedding = torch.randn(1, 12, 8)
    assert resize_position(embedding, (3, 4), (3, 4)) is embedding


def test_half_precision_and_autocast_keep_the_accuracy():
    embedding = torch.randn(1, 196, 8)
    want = resize_position(embedding, (14, 14), (20, 9))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(resize_position(embedding, (14, 14), (20, 9)), want)
    half = resize_position(embedding.bfloat16(), (14, 14), (20, 9))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=2e-2, atol=2e-2)


def test_tables_are_made_once_a_size():
    table = position._bicubic
    table.cache_clear()
    for height in (5, 6, 5, 6):
        resize_position(torch.randn(1, 16, 2), (4, 4), (height, 7))
    info = table.cache_info()
    assert (info.misses, info.hits) == (3, 5)


def test_tables_of_a_forward_pass_without_gradients_serve_training():
    position._bicubic.cache_clear()
    embedding = torch.nn.Parameter(torch.randn(1, 16, 2))
    with torch.inference_mode():
        resize_position(embedding, (4, 4), (5, 6))
    resize_position(embedding, (4, 4), (5, 6)).sum().backward()
    assert embedding.grad.isfinite().all()


def test_a_changed_embedding_is_seen():
    """In place and behind autograd's back, as weight averaging does it."""
    embedding = torch.nn.Parameter(torch.randn(1, 16, 2))
    before = resize_position(embedding, (4, 4), (5, 6))
    embedding.data.mul_(2)
    torch.testing.assert_close(resize_position(embedding, (4, 4), (5, 6)), 2 * before)


def test_compiles():
    torch._dynamo.reset()
    embedding = torch.randn(1, 16, 2)
    compiled = torch.compile(resize_position, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(
        compiled(embedding, (4, 4), (5, 6)),
        resize_position(embedding, (4, 4), (5, 6)),
    )


def test_one_graph_for_all_sizes():
    """It is right at the size of the embedding, too, and needs no float64."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda embedding, image: resize_position(embedding, (4, 5), image.shape),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    embedding = torch.randn(1, 20, 3)
    for size in [(6, 7), (4, 5), (4, 9), (3, 2), (31, 64)]:
        got = compiled(embedding, torch.empty(size))
        want = resize_position(embedding, (4, 5), size)
        assert (got - want).abs().max() < 2e-6
    assert len(graphs) == 1 and 'float64' not in graphs[0].code
