"""Images of several sizes in one batch: each is computed as if it were alone."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import mmvssm
from families import FAMILIES
from mmvssm.analysis.flops import count_flops
from mmvssm.backbones import VSSM, LinearAttentionStudy, hierarchical, set_img_shapes
from mmvssm.engine.configs.image_sizes import Batch
from mmvssm.engine.launching.gpu_check import calls_of
from mmvssm.registry import MODELS

from .isotropic_models import BUILDERS

SMALL = dict(depths=(1, 1), dims=16)
STUDY = dict(SMALL, head_dim=8)
STAGES = dict(out_indices=(0, 1), drop_path_rate=0.0)
STUDIES = {
    # All that a position of the padding can reach, each by its own way.
    'study': lambda **k: LinearAttentionStudy(STUDY, **STAGES | k),
    'study-positions': lambda **k: LinearAttentionStudy(
        STUDY, position=('ape', 'lepe', 'cpe', 'rope'), img_size=32, **STAGES | k
    ),
    'study-forget': lambda **k: LinearAttentionStudy(
        STUDY, forget_gate=True, design='all', **STAGES | k
    ),
}
ORDERS = {
    'hilbert': lambda **k: VSSM(SMALL, orders='hilbert', **STAGES | k),
}
MODELS_UNDER_TEST = FAMILIES | BUILDERS | STUDIES | ORDERS
every = pytest.mark.parametrize('name', MODELS_UNDER_TEST)
every_family = pytest.mark.parametrize('name', [*FAMILIES, 'study'])
# Two of one size; one that fills the batch; one of no whole patches; a single pixel,
# less than a patch.
SHAPES = [(28, 36), (48, 64), (37, 21), (28, 36), (1, 1)]
SIZE = (48, 64)


def pair(name, **options):
    """The model with masks and the same one without, in eval mode."""
    torch.manual_seed(0)
    masked = MODELS_UNDER_TEST[name](mask_padding=True, **options)
    plain = MODELS_UNDER_TEST[name](**options)
    for module in masked.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    plain.load_state_dict(masked.state_dict())
    return masked.eval(), plain.eval()


def images(shapes=SHAPES, fill=0.0):
    """Images at the top left of a batch."""
    x = torch.full((len(shapes), 3, *SIZE), fill)
    generator = torch.Generator().manual_seed(1)
    for image, (height, width) in zip(x, shapes):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return x


def flat(outs):
    """Maps and tokens, one after the other."""
    return [t for out in outs for t in (out if isinstance(out, tuple) else (out,))]


def difference(got, alone):
    """Largest difference in the image's positions, in deviations of the map alone."""
    assert not got.isnan().any() and not alone.isnan().any()
    if got.ndim == 4:
        got = got[..., : alone.shape[2], : alone.shape[3]]
    deviation = alone.std(correction=0).clamp(min=1e-3)
    return float((got - alone).abs().max() / deviation)


# ------------------------------------------------------------ alone and padded
@every
@torch.no_grad()
def test_alone_and_padded_agree(name):
    net, plain = pair(name)
    # Nothing of the padding is read, whatever it holds.
    outs = net(images(fill=float('nan')), img_shapes=SHAPES)
    assert [x.shape for x in outs] == [x.shape for x in plain(images())]
    for i, (height, width) in enumerate(SHAPES):
        image = images()[i : i + 1, :, :height, :width]
        alone = net(image, img_shapes=[(height, width)])
        sizes = net.map_sizes(net.whole_size((height, width)))
        for out, want, size in zip(outs, alone, sizes, strict=True):
            assert want.shape[2:] == size and out.is_contiguous()
            assert difference(out[i : i + 1], want) < 1e-4
            out = out[i].clone()
            out[:, : size[0], : size[1]] = 0
            assert not out.any()


@every
@torch.no_grad()
def test_alone_is_what_it_is_without_masks(name):
    """An image of whole patches, and one that is padded to them by hand."""
    net, plain = pair(name)
    for height, width in SHAPES:
        image = images([(height, width)])[..., :height, :width]
        rows, columns = net.whole_size((height, width))
        whole = nn.functional.pad(image, (0, columns - width, 0, rows - height))
        got, want = net(image, img_shapes=[(height, width)]), plain(whole)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize('name', ['vmamba_v05_noz', 'mlla', 'hilbert'])
@torch.no_grad()
def test_stems_of_any_size(name):
    """They leave nothing out, so nothing is added, either."""
    net, plain = pair(name)
    for height, width in SHAPES:
        image = images([(height, width)])[..., :height, :width]
        got = net(image, img_shapes=[(height, width)])
        for out, want in zip(got, plain(image), strict=True):
            assert out.shape == want.shape and difference(out, want) < 1e-5


@every
@torch.no_grad()
def test_without_masks_they_differ(name):
    _, plain = pair(name)
    out = plain(images())[-1]
    alone = plain(images()[:1, :, :28, :36])[-1]
    assert difference(out[:1], alone) > 1e-2


@pytest.mark.parametrize('name', ['vim-middle', 'vim-double', 'mambar', 'mambar-none'])
@torch.no_grad()
def test_tokens(name):
    """Class tokens and registers are those of the image alone, in its place."""
    net, plain = pair(name, return_tokens=True)
    outs, without = net(images(), img_shapes=SHAPES), plain(images())
    for out, other in zip(outs, without, strict=True):
        assert [x.shape for x in out] == [x.shape for x in other]
    for i, (height, width) in enumerate(SHAPES):
        image = images()[i : i + 1, :, :height, :width]
        alone = net(image, img_shapes=[(height, width)])
        for out, want in zip(flat(outs), flat(alone), strict=True):
            assert not want.numel() or difference(out[i : i + 1], want) < 1e-4
    if without[-1][1].numel():
        alone = plain(images()[:1, :, :28, :36])
        assert difference(without[-1][1][:1], alone[-1][1]) > 1e-2


# ------------------------------------------------------------------- gradients
def gradients(net, x, shapes):
    """Of the images and of all weights, by the sum over images of each one's own."""
    x = x.clone().requires_grad_()
    weight = torch.Generator().manual_seed(2)
    loss = 0
    for out in net(x, img_shapes=shapes):
        factors = torch.randn(out.shape[1], 1, 1, generator=weight)
        loss = loss + (out * factors).square().sum()
    loss.backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return x.grad, found


@every_family
def test_gradients(name):
    """Zero for the padding; for images and weights those of the images alone."""
    net, _ = pair(name)
    got, weights = gradients(net, images(), SHAPES)
    total = [torch.zeros_like(x) for x in weights]
    for i, (height, width) in enumerate(SHAPES):
        image = images()[i : i + 1, :, :height, :width]
        alone, more = gradients(net, image, [(height, width)])
        torch.testing.assert_close(
            got[i : i + 1, :, :height, :width],
            alone,
            rtol=1e-3,
            atol=1e-4 * float(alone.abs().max()),
        )
        total = [a + b for a, b in zip(total, more)]
        rest = got[i].clone()
        rest[:, :height, :width] = 0
        assert not rest.any()
    for a, b in zip(weights, total):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert all(x.abs().sum() > 0 for x in weights)


@pytest.mark.parametrize('name', ['vmamba_v05_noz', 'mambar'])
def test_recomputed_blocks(name, monkeypatch):
    calls = []

    def count(*args, **kwargs):
        calls.append(args[0])
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(hierarchical, 'checkpoint', count)
    monkeypatch.setattr('mmvssm.backbones.isotropic.checkpoint', count)
    net, _ = pair(name)
    again, _ = pair(name, with_cp=True)
    for a, b in zip(
        gradients(net, images(), SHAPES), gradients(again, images(), SHAPES)
    ):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y)
    # A pass for each size.
    blocks = 4 if name == 'mambar' else 2
    assert len(calls) == blocks * len(set(SHAPES))


def test_batch_norms_in_training():
    """Statistics are of the images of one size; the running ones move once for each."""
    shapes = [(28, 36), (48, 64), (28, 36)]
    net, plain = pair('mlla')
    net.train(), plain.train()
    outs = net(images(shapes), img_shapes=shapes)
    assert net.patch_embed.conv1.norm.num_batches_tracked == 2
    want = plain(images(shapes)[::2, :, :28, :36])
    for out, alone in zip(outs, want, strict=True):
        assert difference(out[::2].detach(), alone.detach()) < 1e-4


def test_dropped_branches():
    """Each image has its own, as without masks."""
    net, _ = pair('vmamba_v05_noz', drop_path_rate=0.9)
    shapes = [(28, 36)] * 8
    x = images(shapes[:1]).expand(8, -1, -1, -1)
    out = net.train()(x, img_shapes=shapes)[-1]
    assert len({float(image.sum()) for image in out}) > 1
    assert out.isfinite().all()


# ------------------------------------------------------------ other ways to run
@pytest.mark.parametrize('name', ['vmamba_v05_noz', 'mambar', 'mlla'])
def test_compiled(name):
    """Every pass is: sizes that are new need no graph of their own."""
    torch._dynamo.reset()
    net, _ = pair(name)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    function, x, first = torch.compile(net, backend=backend), images(), None
    for k in range(12):
        shapes = [(28 + k, 36), (48, 64 - k), (28 + k, 36), (48, 64 - k), (9, 10)]
        if k % 2:
            set_img_shapes(x, shapes)
        with torch.no_grad():
            found = function(x, img_shapes=None if k % 2 else shapes)
            for a, b in zip(found, net(x, img_shapes=shapes), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if k == 3:
            first = len(graphs)
    assert len(graphs) <= first + 5


@every_family
def test_functional(name):
    net, _ = pair(name)
    state = {key: value.detach() for key, value in net.named_parameters()}
    x = images()

    def loss(state, x, shapes):
        outs = functional_call(net, state, (x,), dict(img_shapes=shapes))
        return sum(out.pow(3).sum() for out in outs)

    found = grad(loss)(state, x, SHAPES)
    outs = net(x, img_shapes=SHAPES)
    sum(out.pow(3).sum() for out in outs).backward()
    for key, parameter in net.named_parameters():
        want = parameter.grad
        torch.testing.assert_close(
            found[key], want, rtol=1e-3, atol=1e-4 * float(want.abs().max())
        )
    each = vmap(lambda image: loss(state, image[None], [(28, 36)]))(x[:2])
    alone = loss(state, x[:1], [(28, 36)])
    torch.testing.assert_close(each[0], alone, rtol=1e-4, atol=0)


@every_family
@torch.no_grad()
def test_autocast(name):
    net, _ = pair(name)
    with torch.autocast('cpu', torch.bfloat16):
        outs = net(images(), img_shapes=SHAPES)
        alone = net(images()[:1, :, :28, :36], img_shapes=SHAPES[:1])
    for out, want in zip(outs, alone):
        assert difference(out[:1].float(), want.float()) < 0.1


def test_the_package_runs_it_on_whole_images():
    """FLOPs and the check of the GPU, which have no sizes of images to give."""
    net, plain = pair('vmamba_v05_noz')
    shape = (2, 3, 32, 48)
    assert count_flops(net, shape).flops == count_flops(plain, shape).flops
    batches = [Batch(2, 32, 48)]
    calls = [calls_of(model, batches, torch.device('cpu')) for model in (net, plain)]
    assert len(calls[0]) == len(calls[1]) > 0


# ----------------------------------------------------------------- the sizes
@torch.no_grad()
def test_sizes_go_with_the_batch():
    net, _ = pair('vim')
    x = images()
    want = net(x, img_shapes=SHAPES)
    # As mmdet writes them, some with channels.
    set_img_shapes(x, [(*shape, 3) for shape in SHAPES])
    assert all(torch.equal(a, b) for a, b in zip(net(x), want))
    # What is given in the call comes first.
    given = net(x, img_shapes=[SIZE] * len(SHAPES))
    assert not torch.equal(given[0], want[0])
    for other in (x.clone(), x[:2], x.double()):
        with pytest.raises(ValueError, match=r"'mmvssm.DetDataPreprocessor'"):
            net(other)


@pytest.mark.parametrize(
    'shapes',
    [
        SHAPES[:4],
        [],
        [*SHAPES[:4], (49, 64)],
        [*SHAPES[:4], (48, 65)],
        [*SHAPES[:4], (0, 8)],
        [*SHAPES[:4], (8, -1)],
        [*SHAPES[:4], (8,)],
    ],
    ids=str,
)
def test_wrong_sizes(shapes):
    net, _ = pair('mlla')
    with pytest.raises(ValueError, match='height and width of each of the 5 images'):
        net(images(), img_shapes=shapes)
    x = images()
    set_img_shapes(x, shapes)
    with pytest.raises(ValueError, match='height and width of each of the 5 images'):
        net(x)


@every_family
def test_refusals(name):
    net, plain = pair(name)
    with pytest.raises(ValueError, match='needs the size of each image.*img_shapes='):
        net(images())
    with pytest.raises(ValueError, match='no effect without mask_padding'):
        plain(images(), img_shapes=SHAPES)
    with pytest.raises(ValueError, match=r'B, 3, H, W'):
        net(torch.zeros(3, 48, 64))
    with pytest.raises(ValueError, match=r'B, 3, H, W'):
        net(torch.zeros(1, 4, 48, 64), img_shapes=[(48, 64)])


def test_classifiers():
    with pytest.raises(ValueError, match='mask_padding=False'):
        mmvssm.build_classifier('mlla_t', mask_padding=True)


def test_wrong_map_sizes_are_told(monkeypatch):
    """A family of somebody else's whose stem has another stride."""
    net, _ = pair('mlla')
    monkeypatch.setattr(net, 'map_sizes', lambda size: [(24, 32), (12, 16)])
    with pytest.raises(RuntimeError, match='by map_sizes of the backbone'):
        net(images(), img_shapes=SHAPES)


def test_from_a_config():
    net = MODELS.build(dict(type='mmvssm.VSSM', arch=SMALL, out_indices=(1,)))
    assert not net.mask_padding
    net = MODELS.build(
        dict(type='mmvssm.VSSM', arch=SMALL, out_indices=(1,), mask_padding=True)
    )
    assert copy.deepcopy(net).mask_padding


# -------------------------------------------------------------- many processes
class FSDPModule:
    """The name by which torch marks what it shards."""


def test_processes_that_would_wait(monkeypatch):
    """Their numbers of passes differ: refused rather than a dead lock."""
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    net, _ = pair('mlla')
    # A batch norm in training takes more than one position.
    shapes = [(28, 36), (48, 64), (37, 21)]
    x = images(shapes)
    net.train()(x, img_shapes=shapes)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(RuntimeError, match='SyncBatchNorm waits.*Train with DDP'):
        synchronised(x, img_shapes=shapes)
    # Only in training do they wait.
    synchronised.eval()(x, img_shapes=shapes)

    net, _ = pair('vim')
    block = net.layers[0]
    block.__class__ = type('Sharded', (FSDPModule, type(block)), {})
    with pytest.raises(RuntimeError, match='Sharded waits'):
        net(images(), img_shapes=SHAPES)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 1)
    net(images(), img_shapes=SHAPES)
