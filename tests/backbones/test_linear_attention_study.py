import pytest
import torch
import torch.nn.functional as F

from mmvssm.backbones import LinearAttentionStudy
from mmvssm.checkpoints import CheckpointError, load_checkpoint
from mmvssm.engine.training.layer_decay import find_depths
from mmvssm.layers import resize_position
from mmvssm.layers.unified_attention import StepSize2d
from mmvssm.ops import selective_scan

TINY = dict(depths=(1, 1, 1, 1), dims=8, head_dim=4, mlp_ratio=2.0)
MAMBA = dict(
    input_gate=True,
    forget_gate=True,
    shortcut=True,
    normalise=False,
    single_head=True,
    feature_map=False,
)
SETTINGS = {
    'baseline': dict(),
    'input gate': dict(input_gate=True),
    'forget gate': dict(forget_gate=True),
    'shortcut': dict(shortcut=True),
    'no normalisation': dict(normalise=False),
    'single head': dict(single_head=True),
    'all': dict(design='all'),
    'sub': dict(design='sub'),
    'ape': dict(position=('ape',), img_size=(40, 72)),
    'lepe': dict(position=('lepe',)),
    'cpe': dict(position=('cpe',)),
    'rope': dict(position=('rope',)),
    'mlla block': dict(design='sub', position=['cpe', 'lepe', 'rope']),
    'forget gate and all positions': dict(
        forget_gate=True, position=('ape', 'lepe', 'cpe', 'rope')
    ),
    'mamba': dict(MAMBA, design='all'),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('setting', SETTINGS.values(), ids=list(SETTINGS))
def test_maps_and_gradients(setting):
    model = LinearAttentionStudy(TINY, **setting)
    outs = model(torch.randn(2, 3, 37, 70))
    assert [tuple(x.shape) for x in outs] == [
        (2, 8, 9, 17),
        (2, 16, 5, 9),
        (2, 32, 3, 5),
        (2, 64, 2, 3),
    ]
    assert all(x.is_contiguous() and x.isfinite().all() for x in outs)
    sum(x.square().mean() for x in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    'setting', [dict(), dict(MAMBA, design='all'), dict(position=('ape', 'rope'))]
)
def test_checkpointing_and_eval_change_nothing(setting):
    model = LinearAttentionStudy(TINY, drop_path_rate=0.0, **setting)
    again = LinearAttentionStudy(TINY, drop_path_rate=0.0, with_cp=True, **setting)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 48)
    grads = []
    for net in (model, again):
        outs = net(x)
        sum(y.sum() for y in outs).backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(model.eval()(x), again(x))


def test_block_of_mamba_by_its_parts():
    """One stage with all six switches is Mamba's block around its scan."""
    arch = dict(TINY, depths=(1,))
    model = LinearAttentionStudy(
        arch, design='all', out_indices=(0,), out_norm=False, **MAMBA
    ).double()
    image = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    stem = model.patch_embed(image)
    block = model.layers[0].blocks[0]
    mixer, attention = block.mixer, block.mixer.attention
    x = block.norm1(stem).permute(0, 2, 3, 1)
    conv = mixer.conv(mixer.in_proj(x.permute(0, 3, 1, 2)))
    u = F.silu(conv).flatten(2)
    C, B = attention.qk(u[..., None])[..., 0].chunk(2, 1)
    step = attention.step
    delta = (step.up.weight @ step.down.weight) @ u
    y = selective_scan(
        u,
        delta,
        -attention.A_log.exp(),
        B,
        C,
        attention.D,
        delta_bias=step.up.bias,
        delta_softplus=True,
    )
    y = y.mT * F.silu(
        F.linear(x, mixer.gate_proj.weight, mixer.gate_proj.bias)
    ).flatten(1, 2)
    y = F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias)
    want = stem + y.mT.unflatten(2, stem.shape[2:])
    torch.testing.assert_close(model(image)[0], want)
    assert u.shape[1] == 2 * stem.shape[1] and B.shape[1] == TINY['head_dim']


def test_switches_have_parameters_of_their_own_only():
    """Nothing else changes with a switch, so weights can be compared."""
    names = {
        key: {
            name for name, _ in LinearAttentionStudy(TINY, **setting).named_parameters()
        }
        for key, setting in SETTINGS.items()
    }
    base = names['baseline']
    added = {
        'input gate': {'step.down.weight', 'step.up.weight', 'step.up.bias'},
        'forget gate': {'step.down.weight', 'step.up.weight', 'step.up.bias', 'A_log'},
        'shortcut': {'D'},
        'no normalisation': set(),
        'single head': set(),
        'rope': set(),
        'lepe': {'lepe.weight', 'lepe.bias'},
    }
    for key, tensors in added.items():
        assert base <= names[key], key
        got = {name.partition('.attention.')[2] for name in names[key] - base}
        assert got == tensors, key
    assert {name.rpartition('.')[2] for name in names['ape'] - base} == {'pos_embed'}
    assert all('cpe' in name for name in names['cpe'] - base)
    assert not any('mlp' in name for name in names['all'])
    assert any('mlp' in name for name in names['sub'])


def test_weights_at_the_start():
    model = LinearAttentionStudy(TINY, **MAMBA)
    attention = model.layers[0].blocks[0].mixer.attention
    torch.testing.assert_close(attention.A_log.exp(), torch.arange(1.0, 5).expand(8, 4))
    assert attention.D.eq(1).all() and attention.qk.bias.eq(0).all()
    for module in model.modules():
        if isinstance(module, StepSize2d):
            step = F.softplus(module.up.bias)
            assert 1e-4 <= step.min() and step.max() <= 0.1001
    steps = LinearAttentionStudy(TINY, input_gate=True).layers[0].blocks[0].mixer
    assert F.softplus(steps.attention.step.up.bias).sub(1).abs().max() < 1e-6


def test_position_embedding_is_of_the_size_of_the_map():
    model = LinearAttentionStudy(TINY, position=('ape',), img_size=(40, 72))
    grids = [stage.blocks[0].grid for stage in model.layers]
    assert grids == [(10, 18), (5, 9), (3, 5), (2, 3)]
    at = [x.shape[2:] for x in model(torch.randn(1, 3, 40, 72))]
    assert [tuple(size) for size in at] == grids


def test_heads():
    def first_block(**setting):
        with torch.device('meta'):
            return LinearAttentionStudy('t', **setting).layers[0].blocks[0]

    with torch.device('meta'):
        stages = LinearAttentionStudy('t').layers
    assert [s.blocks[0].mixer.attention.heads for s in stages] == [3, 6, 12, 24]
    attention = first_block(design='all').mixer.attention
    assert attention.heads == 3 and attention.qk.weight.shape == (192, 192)
    attention = first_block(single_head=True).mixer.attention
    assert attention.heads == 1 and attention.qk.weight.shape == (64, 96)


@pytest.mark.parametrize(
    'setting,message',
    [
        (dict(arch='x'), "unknown arch 'x'"),
        (dict(arch=dict(dims=8)), 'depths'),
        (dict(arch=dict(TINY, head_dim=3)), 'head_dim 3 does not divide the 8'),
        (dict(design='half'), 'design must be one of'),
        (dict(position='rope'), 'position must be a sequence'),
        (dict(position=('rpe',)), 'position must be a sequence'),
        (dict(feature_map=False), 'needs forget_gate=True'),
        (dict(position=('ape',), img_size=3), 'img_size must .* at least 4'),
        (dict(out_indices=(4,)), 'out_indices'),
    ],
)
def test_what_does_not_fit_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LinearAttentionStudy(**{'arch': TINY, **setting})


def test_small_images_are_refused():
    with pytest.raises(ValueError, match='at least 4x4 pixels'):
        LinearAttentionStudy(TINY)(torch.randn(1, 3, 3, 9))


# --------------------------------------------------- as a family like the others
@pytest.mark.parametrize('design', ['transformer', 'all', 'sub'])
def test_pretrained(tmp_path, design):
    net = LinearAttentionStudy(TINY, design=design)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    torch.save(dict(state_dict=net.state_dict()), tmp_path / 'own.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'own.pth'))
    other = LinearAttentionStudy(TINY, design=design, init_cfg=cfg)
    other.init_weights()
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_file_of_another_design_is_refused():
    file = LinearAttentionStudy(TINY, design='all').state_dict()
    with pytest.raises(CheckpointError, match='does not fit the model'):
        load_checkpoint(LinearAttentionStudy(TINY), file)


def test_position_embeddings_of_another_grid():
    file = LinearAttentionStudy(TINY, position=('ape',), img_size=64)
    net = LinearAttentionStudy(TINY, position=('ape',), img_size=(64, 96))
    report = load_checkpoint(net, file.state_dict())
    key = 'layers.0.blocks.0.pos_embed'
    assert f'{key} was resized from 16x16 to 16x24' in report.notes
    want = resize_position(file.state_dict()[key], (16, 16), (16, 24))
    assert torch.equal(net.state_dict()[key], want)


def test_layer_decay():
    net = LinearAttentionStudy(TINY, position=('ape',))
    depths, last = find_depths(dict(net.named_parameters()), 'the test')
    assert last == sum(TINY['depths']) + 1
    assert depths['patch_embed.0.weight'] == 0
    assert depths['layers.0.blocks.0.pos_embed'] == 1
    assert depths['norm0.weight'] == last
