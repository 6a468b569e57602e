"""What Vim and Mamba® have in common as dense backbones."""

import subprocess
import sys

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS

from compare import relative_error
from mmvssm.backbones import MambaR, Vim
from mmvssm.backbones import isotropic as module
from mmvssm.families import recognise
from mmvssm.layers import DropPath
from mmvssm.ops import use_backend

from .isotropic_models import BUILDERS, TINY, loss

every = pytest.mark.parametrize('build', BUILDERS.values(), ids=BUILDERS)
both = pytest.mark.parametrize('cls', [Vim, MambaR])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------- shapes and sizes
@every
@pytest.mark.parametrize(
    'size', [(32, 32), (24, 40), (33, 47), (64, 48), (4, 65), (9, 4), (4, 4)], ids=str
)
def test_sizes(build, size):
    """Smaller and larger than stored, not square, one patch high, odd."""
    net = build()
    stride = net.stride
    maps = net(torch.randn(2, 3, *size))
    grid = tuple((side - 4) // stride + 1 for side in size)
    assert [tuple(x.shape) for x in maps] == [(2, 16, *grid)] * 4
    assert all(x.is_contiguous() and x.isfinite().all() for x in maps)
    loss(maps).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@both
def test_wrong_inputs(cls):
    net = cls(dict(TINY, patch_size=16, stride=16))
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 15, 32), (1, 3, 32, 15)):
        with pytest.raises(
            ValueError, match=rf'{cls.__name__} .*B, 3, H, W.*at least 16x16 pixels'
        ):
            net(torch.zeros(shape))


@every
def test_rectangle_96x160(build):
    net = build(out_indices=(3,)).eval()
    (out,) = net(torch.randn(1, 3, 96, 160))
    assert out.shape[2:] == ((96 - 4) // net.stride + 1, (160 - 4) // net.stride + 1)


@every
def test_samples_do_not_depend_on_one_another(build):
    net = build().eval()
    x = torch.randn(2, 3, 40, 28)
    for a, b in zip(net(x), net(x[1:]), strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


@every
def test_every_patch_reaches_its_place(build):
    """Without mixing, a map is the normed patches, row by row."""
    net = build(out_indices=(0,), last_layer_process='norm').eval()
    with torch.no_grad():
        for name in net.token_names:
            getattr(net, name).zero_()
        net.layers[0].mixer.out_proj.weight.zero_()
        x = torch.randn(1, 3, 20, 12)
        (out,) = net(x)
        want = torch.nn.functional.rms_norm(
            net.patch_embed(x).movedim(1, -1), (16,), eps=1e-5
        ).movedim(-1, 1)
    if net.rope is None:
        torch.testing.assert_close(out, want)
    else:
        # Turned, not moved: the length of pairs of channels stays.
        a, b = (t.unflatten(1, (8, 2)).norm(dim=2) for t in (out, want))
        torch.testing.assert_close(a, b)
        assert not torch.allclose(out, want)


# ------------------------------------------------------------- the mmseg options
@every
@pytest.mark.parametrize('feature', ['hidden', 'residual'])
@pytest.mark.parametrize('process', ['none', 'add', 'norm'])
@pytest.mark.parametrize('indices', [(0,), (1, 3), (2,), (0, 1, 2, 3)])
def test_out_indices(build, indices, feature, process):
    net = build(out_indices=indices, feature=feature, last_layer_process=process)
    maps = net(torch.randn(2, 3, 28, 40))
    assert len(maps) == len(indices) == len(net.out_channels)
    assert len(net.layers) == indices[-1] + 1
    # Nothing is there that no loss reaches.
    loss(maps).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@both
def test_features(cls):
    """Each map against the blocks run by hand."""
    net = cls(TINY, img_size=32).eval()
    hidden, streams = [], []

    def keep(block, args, out):
        hidden.append(out[0])
        streams.append(out[1])

    for block in net.layers:
        block.register_forward_hook(keep)
    x = torch.randn(1, 3, 32, 32)
    positions = net.token_positions(64)
    patches = [i for i in range(64 + len(positions)) if i not in positions]

    def as_map(sequence):
        return sequence[:, patches].mT.unflatten(2, (8, 8))

    with torch.no_grad():
        net(x)
        stream = streams[-1] + hidden[-1]
        norm = torch.nn.functional.rms_norm(stream, (16,), eps=1e-5)
        last = dict(none=hidden[-1], add=stream, norm=norm)
        inner = dict(hidden=hidden[:3], residual=streams[1:])
        state = net.state_dict()
        for feature, before in inner.items():
            for process, end in last.items():
                dense = cls(
                    TINY, img_size=32, feature=feature, last_layer_process=process
                )
                dense.eval().load_state_dict(state, strict=False)
                for got, want in zip(dense(x), [*before, end], strict=True):
                    torch.testing.assert_close(got, as_map(want))


@both
def test_default_indices(cls):
    def indices(depth):
        with torch.device('meta'):
            return cls(dict(TINY, depth=depth)).out_indices

    assert indices(24) == (5, 11, 17, 23)
    assert indices(48) == (11, 23, 35, 47)
    assert indices(2) == (0, 1)


@both
@pytest.mark.parametrize('indices', [(), (4,), (-1,), (1, 0), (1, 1)])
def test_wrong_out_indices(cls, indices):
    with pytest.raises(ValueError, match='out_indices'):
        cls(TINY, out_indices=indices)


@every
@pytest.mark.parametrize('frozen', [-1, 0, 1, 4])
def test_frozen_stages(build, frozen):
    net = build(drop_path_rate=0.5, last_layer_process='norm', frozen_stages=frozen)
    parts = {'patch_embed.': frozen >= 0, 'norm_f.': False}
    parts.update({f'layers.{i}.': i < frozen for i in range(4)})
    for mode in (True, False, True):
        net.train(mode)
        for part, is_frozen in parts.items():
            expected = mode and not is_frozen
            assert net.get_submodule(part[:-1]).training is expected, part
    parts.update(dict.fromkeys(net.token_names, frozen >= 0))
    loss(net(torch.randn(2, 3, 32, 32))).backward()
    for name, parameter in net.named_parameters():
        is_frozen = next(f for part, f in parts.items() if name.startswith(part))
        assert parameter.requires_grad is not is_frozen, name
        assert (parameter.grad is None) is is_frozen, name


@both
def test_wrong_frozen_stages(cls):
    with pytest.raises(ValueError, match='between -1 .* and 2'):
        cls(TINY, out_indices=(1,), frozen_stages=3)
    with pytest.raises(ValueError, match='frozen_stages'):
        cls(TINY, frozen_stages=-2)


@every
@pytest.mark.parametrize('frozen', [-1, 1])
def test_with_cp_gives_the_same_gradients(build, frozen, monkeypatch):
    calls = []
    checkpoint = module.checkpoint
    monkeypatch.setattr(
        module,
        'checkpoint',
        lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs),
    )
    options = dict(drop_path_rate=0.5, frozen_stages=frozen)
    plain, saving = build(**options), build(**options, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 20, 28)
    for net in (plain, saving):
        # The same samples must be dropped, also in the recomputation.
        torch.manual_seed(1)
        loss(net(x)).backward()
    assert len(calls) == 4
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.no_grad():
        saving(x)
    assert len(calls) == 4


@both
def test_drop_path_rates(cls):
    """The output of a block is dropped in the next; dense models keep the last."""

    def rates(**options):
        net = cls(dict(TINY, drop_path_rate=0.3), **options)
        found = [m for m in net.modules() if isinstance(m, DropPath)]
        assert found[-1] is net.drop_path
        return [m.drop_prob for m in found]

    assert rates() == pytest.approx([0, 0, 0.1, 0.2, 0])
    assert rates(drop_path_rate=0.6) == pytest.approx([0, 0, 0.2, 0.4, 0])
    assert rates(out_indices=(1,)) == pytest.approx([0, 0, 0])
    assert rates(classification=True) == pytest.approx([0, 0, 0.1, 0.2, 0.3])


@both
@torch.no_grad()
def test_classifiers_drop_the_last_output_before_the_norm(cls):
    class Dropped(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    net = cls(TINY, img_size=32, classification=True).eval()
    net.drop_path = Dropped()
    streams = []
    net.layers[-1].register_forward_hook(lambda _, args, out: streams.append(out[1]))
    ((out, tokens),) = net(torch.randn(2, 3, 32, 32))
    positions = net.token_positions(64)
    patches = [i for i in range(64 + len(positions)) if i not in positions]
    want = torch.nn.functional.rms_norm(streams[0], (16,), eps=1e-5)
    torch.testing.assert_close(out.flatten(2).mT, want[:, patches])
    torch.testing.assert_close(tokens, want[:, list(positions)])


@both
def test_drop_path_only_in_training(cls):
    net = cls(TINY, img_size=32, drop_path_rate=0.8, last_layer_process='norm')
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(net(x)[-1], net(x)[-1])
    net.eval()
    assert torch.equal(net(x)[-1], net(x)[-1])


@both
def test_classification_form(cls):
    net = cls(TINY, img_size=32, classification=True).eval()
    assert net.out_indices == (3,) and net.last_layer_process == 'norm'
    ((out, tokens),) = net(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 16, 8, 8)
    assert tokens.shape == (2, len(net.token_positions(64)), 16)


# ----------------------------------------------------------------------- dtypes
@every
def test_autocast(build):
    net = build(feature='residual', last_layer_process='add')
    x = torch.randn(2, 3, 32, 32)
    want = net(x)
    with torch.autocast('cpu', torch.bfloat16):
        maps = net(x)
    assert {x.dtype for x in maps} == {torch.float32}
    loss(maps).backward()
    for got, full in zip(maps, want, strict=True):
        assert (got - full).norm() < 0.05 * full.norm()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in net.parameters()
    )


@every
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_weights_without_autocast(build, dtype):
    net = build().to(dtype)
    maps = net(torch.randn(1, 3, 32, 32, dtype=dtype))
    assert all(x.dtype == dtype and x.isfinite().all() for x in maps)


@pytest.mark.parametrize('name', ['vim-rope', 'mambar'])
def test_compile_fullgraph(name):
    net = BUILDERS[name]().eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    x = torch.randn(1, 3, 24, 40)
    for got, want in zip(compiled(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------- arch, initialisation, decay
@both
@pytest.mark.parametrize(
    'arch, message',
    [
        ('h', "unknown arch 'h'.*'b'"),
        (dict(depth=4), "missing keys .'embed_dims'"),
        (dict(TINY, width=3), "unknown keys .'width'"),
        (dict(TINY, depth=0), 'depth must be a positive integer, got 0'),
        (dict(TINY, embed_dims='t'), "embed_dims must be a positive integer, got 't'"),
    ],
)
def test_wrong_arch(cls, arch, message):
    with pytest.raises(ValueError, match=message):
        cls(arch)


@both
def test_other_wrong_arguments(cls):
    with pytest.raises(ValueError, match="feature must be one of .* got 'both'"):
        cls(TINY, feature='both')
    with pytest.raises(ValueError, match='last_layer_process must be one of'):
        cls(TINY, last_layer_process='add & norm')
    for size in (3, (16, 2), (16, 16, 16)):
        with pytest.raises(
            ValueError,
            match='img_size must .* at least 4',
        ):
            cls(TINY, img_size=size)


@both
def test_registry(cls):
    net = MMENGINE_MODELS.build(
        dict(type=f'mmvssm.{cls.__name__}', arch=TINY, out_indices=(0, 2), img_size=64)
    )
    assert isinstance(net, cls) and net.out_channels == (16, 16)
    assert net.grid == (16, 16)


@both
@torch.no_grad()
def test_initialisation(cls):
    arch = dict(TINY, embed_dims=64, patch_size=16, stride=16)
    for classification in (False, True):
        net = cls(arch, img_size=224, classification=classification)
        weight = net.patch_embed.proj.weight
        std = weight[0].numel() ** -0.5
        assert weight.std() == pytest.approx(std, rel=0.05)
        assert weight.abs().max() <= 2.3 * std
        assert not net.patch_embed.proj.bias.any()
        for name in net.token_names:
            if getattr(net, name).numel() > 1000:
                assert getattr(net, name).std() == pytest.approx(0.02, rel=0.1), name
        for block in net.layers:
            mixer = block.mixer
            # PyTorch's uniform initialisation, divided by the root of the depth.
            bound = mixer.out_proj.in_features**-0.5 / 2
            assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
            step = torch.nn.functional.softplus(mixer.dt_proj.bias)
            assert 9e-4 < step.min() and step.max() < 0.11
            step = torch.nn.functional.softplus(mixer.dt_proj_b.bias)
            if classification:
                # As published, for the backward direction only.
                assert not mixer.dt_proj_b.bias.any()
            else:
                assert 9e-4 < step.min() and step.max() < 0.11


@both
def test_init_weights_keeps_the_initialisation(cls):
    net = cls(TINY)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.init_weights()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@every
def test_no_weight_decay(build):
    net = build(last_layer_process='norm')
    exempt = net.no_weight_decay()
    block = 'layers.0.'
    assert {
        *net.token_names,
        'norm_f.weight',
        'patch_embed.proj.bias',
        block + 'norm.weight',
        block + 'mixer.D',
        block + 'mixer.D_b',
        block + 'mixer.dt_proj.bias',
        block + 'mixer.conv1d_b.bias',
    } <= exempt
    assert exempt.isdisjoint(
        f'{block}mixer.{name}'
        for name in ('A_log', 'A_b_log', 'in_proj.weight', 'conv1d.weight')
    )
    assert exempt <= {name for name, _ in net.named_parameters()}


# ----------------------------------------------------------------------- memory
_PEAK = """
import re, sys
from pathlib import Path
import torch
from mmvssm.backbones import Vim
torch.set_num_threads(1)
def peak():  # not ru_maxrss: that one starts at the size of the parent process
    status = Path('/proc/self/status').read_text()
    return int(re.search('VmHWM:[^0-9]*([0-9]+)', status)[1]) / 1024
arch = dict(embed_dims=64, depth=24, patch_size=4, stride=4)
net = Vim(arch, img_size=128, with_cp=sys.argv[1] == 'True')
for size in (8, 128):
    before = peak()
    sum(x.square().mean() for x in net(torch.randn(1, 3, size, size))).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='measures in KiB, as on Linux')
def test_with_cp_saves_memory():
    """Peak memory of a step, in MiB beyond what a tiny step needed."""
    plain, saving = (
        float(
            subprocess.run(
                [sys.executable, '-c', _PEAK, str(with_cp)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for with_cp in (False, True)
    )
    assert plain > 60
    assert saving < plain / 2


# ------------------------------------------------- expansion and convolution
@both
@pytest.mark.parametrize('backend', ['reference', 'torch', 'cpu'])
@pytest.mark.parametrize('change', [dict(expand=1), dict(expand=3), dict(d_conv=2)])
def test_expand_and_d_conv(cls, change, backend):
    torch.manual_seed(0)
    net = cls(dict(TINY, **change), img_size=32)
    mixer = net.layers[0].mixer
    inner = change.get('expand', 2) * TINY['embed_dims']
    assert mixer.A_log.shape[0] == mixer.out_proj.in_features == inner
    assert mixer.conv1d.weight.shape == (inner, 1, change.get('d_conv', 4))
    x = torch.randn(1, 3, 32, 32)
    with use_backend('reference'):
        want = net(x)[-1]
    with use_backend(backend):
        got = net(x)[-1]
    assert relative_error(got, want) < 1e-5
    description = recognise(net.state_dict(), 'the model').family.describe(
        net.state_dict()
    )
    assert all(f'{key}={value}' in description for key, value in change.items())


@both
@pytest.mark.parametrize('key', ['expand', 'd_conv'])
@pytest.mark.parametrize('value', [0, 1.5, '2', True])
def test_wrong_expand_and_d_conv(cls, key, value):
    with pytest.raises(ValueError, match=f'{key} must be a positive integer'):
        cls(dict(TINY, **{key: value}))
