"""The peers are the published ones; steps, probes and turns do what they say."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmvssm.analysis.measuring import peers, probe, process_memory, steps, timing, turns

QUICK = timing.Effort(rounds=2, turn=0.0, limit=0.0)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_peers_have_as_many_parameters_as_published():
    with torch.device('meta'):
        assert count(peers.ConvNeXt(1000)) == 28_589_128
        assert count(peers.DeiT(1000)) == 22_050_664
    pytest.importorskip('mmseg')
    assert count(peers.swin('swin_t', 1000)) == 28_288_354


def test_convnext_by_hand():
    """Against the maps channels-first, where layer norm is written out."""
    torch.manual_seed(0)
    model = peers.ConvNeXt(5, depths=(1, 1), dims=(4, 8)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)

    def norm(x, layer):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    def block(x, layer):
        depthwise, groups = layer.depthwise, x.shape[1]
        y = F.conv2d(x, depthwise.weight, depthwise.bias, padding=3, groups=groups)
        y = norm(y, layer.norm).movedim(1, -1)
        y = layer.shrink(F.gelu(layer.expand(y))) * layer.scale
        return x + y.movedim(-1, 1)

    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    stem, norm1, block1, norm2, down, block2 = model.layers
    x = block(norm(F.conv2d(images, stem.weight, stem.bias, stride=4), norm1), block1)
    x = block(F.conv2d(norm(x, norm2), down.weight, down.bias, stride=2), block2)
    pooled = x.mean((2, 3), keepdim=True)
    want = model.head(norm(pooled, model.norm).flatten(1))
    torch.testing.assert_close(model(images), want)


def test_deit_by_hand():
    torch.manual_seed(0)
    model = peers.DeiT(5, (8, 12), channels=6, depth=1, heads=2, patch=4)
    images = torch.randn(2, 3, 8, 12)
    x = model.patches(images).flatten(2).mT
    x = torch.cat((model.token.repeat(2, 1, 1), x), 1) + model.positions
    (block,) = model.blocks
    q, k, v = block.attention.qkv(block.norm1(x)).chunk(3, -1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(3)).softmax(-1)
        heads.append(weights @ v[..., part])
    x = x + block.attention.proj(torch.cat(heads, -1))
    x = x + block.mlp(block.norm2(x))
    want = model.head(model.norm(x)[:, 0])
    torch.testing.assert_close(model(images), want)


def test_swin_computes_in_bfloat16(monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.setitem(peers.MMSEG, 'swin_t', dict(depths=(2, 1, 1, 1)))
    model = peers.swin('swin_t', 5).bfloat16()
    out = model(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_step_trains_or_infers():
    seen = {}

    class Model(torch.nn.Linear):
        def forward(self, images):
            seen.update(
                dtype=images.dtype,
                training=self.training,
                grad=torch.is_grad_enabled(),
                autocast=torch.is_autocast_enabled('cpu'),
            )
            return super().forward(images.flatten(1))

    for dtype in steps.DTYPES:
        for mode in steps.MODES:
            model = steps.in_dtype(Model(48, steps.CLASSES), dtype)
            model.weight.register_post_accumulate_grad_hook(
                lambda weight: seen.update(gradient=weight.grad.abs().sum() > 0)
            )
            seen.clear()
            case = steps.Case(4, 4, 2, 1, mode)
            steps.make_step(model, case, steps.Contender('any', dtype))()
            training = mode == 'training'
            assert seen.get('gradient', False) == training
            assert seen['training'] == seen['grad'] == training
            assert seen['autocast'] == (dtype == 'autocast')
            narrow = dtype == 'bfloat16'
            assert seen['dtype'] == (torch.bfloat16 if narrow else torch.float32)
            assert model.weight.grad is None


def test_difference_of_dtypes(monkeypatch):
    monkeypatch.setitem(
        steps.PEERS,
        'tiny',
        lambda size: peers.ConvNeXt(7, depths=(1, 1), dims=(8, 16)),
    )
    same = steps.difference('tiny', 'float32', (16, 16), count=5, batch=2)
    assert same['images'] == 5 and same['classes'] >= 1
    assert same['largest'] == 0 and same['same_class'] == 1
    for dtype in ('bfloat16', 'autocast'):
        other = steps.difference('tiny', dtype, (16, 16), count=5, batch=2)
        assert 0 < other['largest'] < 0.1
    monkeypatch.setattr(
        steps, 'in_dtype', lambda model, dtype: lambda x: math.nan * model(x)
    )
    broken = steps.difference('tiny', 'float32', (16, 16), count=2)
    assert math.isnan(broken['largest'])


def test_probe(monkeypatch):
    probe.start(['vim_t'])
    case, vim = steps.Case(32, 32, 1, 1, 'training'), steps.Contender('vim_t')
    found = probe.probe(vim, case, longest=600)
    assert found['parameters'] == count(steps.build('vim_t', (32, 32)))
    with pytest.raises(probe.Unfit, match='over 0 s a step'):
        probe.probe(vim, case, longest=0)
    wrong = steps.Contender('vim_z')
    with pytest.raises(probe.Unfit, match="unknown model 'vim_z'"):
        probe.probe(wrong, case, longest=600)
    if not process_memory.possible():
        pytest.skip('reads the counters of Linux')
    # Weights and gradients, but for the smallest ones, and hardly any activations.
    assert 1.8 < found['peak_bytes'] / (4 * found['parameters']) < 2.5
    monkeypatch.setattr(probe.process_memory, 'available', lambda: 50_000_000)
    # A library that finds no memory may crash instead of saying so.
    short = 'needs more than 0.0 GB of memory|most likely for want of memory'
    with pytest.raises(probe.Unfit, match=short):
        probe.probe(vim, case, longest=600)


def test_what_fails_is_left_out(monkeypatch):
    def fake(contender, case, longest):
        if contender.model == 'large':
            raise probe.Unfit('needs more than 1 GB')
        return dict(parameters=1)

    monkeypatch.setattr(probe, 'probe', fake)
    who = [steps.Contender('large'), steps.Contender('unknown')]
    case = steps.Case(32, 32, 1, 1, 'inference')
    row = turns.measure(case, who, QUICK, 1)
    assert not row['contenders']
    assert row['left_out']['large, float32, eager'] == 'needs more than 1 GB'
    assert 'unknown model' in row['left_out']['unknown, float32, eager']


def small(size):
    """A model that another process can build."""
    return peers.ConvNeXt(10, depths=(1, 1), dims=(8, 16))


class Map(torch.nn.Conv2d):
    """Gives two maps."""

    def __init__(self, size):
        super().__init__(3, 2, 1)

    def forward(self, images):
        maps = super().forward(images)
        return maps, maps[..., ::2]


@pytest.mark.parametrize('mode', steps.MODES)
def test_models_of_ones_own(mode):
    """Without a process for each: any model, of logits or of maps."""
    who = [
        steps.Contender('small', builder=small),
        steps.Contender('maps', builder=Map),
    ]
    case = steps.Case(32, 48, 2, torch.get_num_threads(), mode)
    row = turns.measure(case, who, QUICK, longest=600, memory=False)
    assert not row['left_out']
    for contender in who:
        found = row['contenders'][contender.name]
        assert found['images_per_second'] == pytest.approx(2 / found['median'])
        assert found['parameters'] == count(contender.build((32, 48)))
        assert 'peak_bytes' not in found
    row = turns.measure(case, who[:1], QUICK, longest=0, memory=False)
    assert row['left_out'] == {'small, float32, eager': 'over 0 s a step'}


def test_both_attentions_of_deit_are_one():
    torch.manual_seed(0)
    arguments = dict(channels=6, depth=2, heads=2, patch=4)
    fused = peers.DeiT(5, (8, 12), **arguments)
    other = peers.DeiT(5, (8, 12), **arguments, fused=False)
    other.load_state_dict(fused.state_dict())
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(other(images), fused(images))


def test_peers_by_name():
    with torch.device('meta'):
        assert count(steps.PEERS['deit_t']((224, 224))) == 5_717_416
        assert count(steps.PEERS['deit_t_materialised']((224, 224))) == 5_717_416
    pytest.importorskip('mmseg')
    net = steps.PEERS['swin_t_scaled']((384, 384))
    assert net.backbone.stages[0].blocks[0].attn.w_msa.window_size == (12, 12)


def test_functions_take_turns():
    said, calls = iter([9.0, 3.0, 1.0, 2.0]), []

    def first():
        calls.append('first')
        return next(said)

    # Turns of no length: no call to warm up, one call that counts.
    times = timing.interleaved(
        {'first': first, 'second': lambda: calls.append('second')},
        timing.Effort(rounds=3, turn=0.0),
    )
    assert calls == ['first', 'second'] * 4
    assert times['first'] == dict(median=2.0, fastest=1.0, calls=3)
    assert 0 < times['second']['fastest'] <= times['second']['median']


def test_slow_functions_get_few_turns():
    times = timing.interleaved(
        {'slow': lambda: None}, timing.Effort(rounds=9, turn=0.0, limit=0.0)
    )
    assert times['slow']['calls'] == 3
