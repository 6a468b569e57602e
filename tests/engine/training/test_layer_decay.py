import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmvssm
from mmvssm.backbones import MLLA, VSSM, MambaR, Vim
from mmvssm.checkpoints import CheckpointError
from mmvssm.engine.training.layer_decay import find_depths, format_groups
from parity import Case

PLAIN = dict(embed_dims=8, depth=2, patch_size=4, stride=4, d_state=2)
SCAN = dict(depths=(1, 2), dims=8, drop_path_rate=0.0)


class Segmentor(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(8, 8, 1)
        self.decode_head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))


def segmentor(backbone):
    torch.manual_seed(0)
    return Segmentor(backbone)


def groups_of(model, rate=0.5, **options):
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='mmvssm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
            paramwise_cfg=dict(layer_decay_rate=rate, **options),
        ),
    )
    return wrapper.optimizer.param_groups


def table(groups):
    """Everything about every group: scale, decay and names."""
    rows = []
    for group in groups:
        assert group['lr'] == group['lr_scale']
        assert len(group['params']) == len(group['param_names'])
        row = group['lr'], group['weight_decay'], ' '.join(sorted(group['param_names']))
        rows.append(row)
    return rows


def full_names(prefix, *names):
    return ' '.join(sorted(prefix + name for name in names))


MIXER_DECAYS = (
    'mixer.in_proj.weight',
    'mixer.conv1d.weight',
    'mixer.conv1d_b.weight',
    'mixer.x_proj.weight',
    'mixer.x_proj_b.weight',
    'mixer.dt_proj.weight',
    'mixer.dt_proj_b.weight',
    'mixer.out_proj.weight',
)
MIXER_KEEPS = (
    'norm.weight',
    'mixer.A_log',
    'mixer.A_b_log',
    'mixer.D',
    'mixer.D_b',
    'mixer.conv1d.bias',
    'mixer.conv1d_b.bias',
    'mixer.dt_proj.bias',
    'mixer.dt_proj_b.bias',
)
HEAD_DECAYS = 'decode_head.0.weight neck.weight'
HEAD_KEEPS = ('decode_head.0.bias', 'decode_head.1.bias', 'decode_head.1.weight')


def plain_table(tokens):
    """n = 2 blocks: rate^3 for the stem, rate^2, rate^1, and 1 for the head."""
    stem = ('patch_embed.proj.bias', *tokens)
    rows = [
        (0.125, 0.0, full_names('backbone.', *stem)),
        (0.125, 0.1, 'backbone.patch_embed.proj.weight'),
    ]
    for i, scale in enumerate((0.25, 0.5)):
        prefix = f'backbone.layers.{i}.'
        rows.append((scale, 0.0, full_names(prefix, *MIXER_KEEPS)))
        rows.append((scale, 0.1, full_names(prefix, *MIXER_DECAYS)))
    keeps = full_names('', 'backbone.norm_f.weight', 'neck.bias', *HEAD_KEEPS)
    return [*rows, (1.0, 0.0, keeps), (1.0, 0.1, HEAD_DECAYS)]


@pytest.mark.parametrize(
    'backbone,tokens',
    [
        (lambda: Vim(PLAIN, img_size=16, last_layer_process='norm'), ('pos_embed',)),
        (
            lambda: Vim(
                PLAIN, img_size=16, last_layer_process='norm', cls_token='double'
            ),
            ('pos_embed', 'cls_token_head', 'cls_token_tail'),
        ),
        (
            lambda: MambaR(PLAIN, img_size=16, last_layer_process='norm'),
            ('pos_embed', 'cls_token', 'pos_embed_cls'),
        ),
    ],
    ids=['vim', 'vim-double', 'mambar'],
)
def test_plain_backbones(backbone, tokens):
    assert table(groups_of(segmentor(backbone()))) == plain_table(tokens)


def test_vmamba():
    """n = 3 blocks in two stages; downsampling belongs to the block behind it."""
    backbone = VSSM(SCAN, out_indices=(0, 1))
    decays = (
        'op.in_proj.weight',
        'op.conv2d.weight',
        'op.x_proj_weight',
        'op.dt_projs_weight',
        'op.out_proj.weight',
        'mlp.fc1.weight',
        'mlp.fc2.weight',
    )
    keeps = (
        'norm.weight',
        'norm.bias',
        'norm2.weight',
        'norm2.bias',
        'op.A_logs',
        'op.Ds',
        'op.dt_projs_bias',
        'op.out_norm.weight',
        'op.out_norm.bias',
        'mlp.fc1.bias',
        'mlp.fc2.bias',
    )
    stem = [f'patch_embed.{i}' for i in (0, 2, 5, 7)]
    down = [f'layers.0.downsample.{i}' for i in (1, 3)]
    blocks = [f'layers.{i}.blocks.{j}.' for i, j in ((0, 0), (1, 0), (1, 1))]
    rows = []
    for depth, (kept, decayed) in enumerate(
        [
            (
                [f'{s}.bias' for s in stem] + [f'{s}.weight' for s in stem[1::2]],
                [f'{s}.weight' for s in stem[::2]],
            ),
            ([blocks[0] + n for n in keeps], [blocks[0] + n for n in decays]),
            (
                [blocks[1] + n for n in keeps]
                + [down[0] + '.bias', down[1] + '.bias', down[1] + '.weight'],
                [blocks[1] + n for n in decays] + [down[0] + '.weight'],
            ),
            ([blocks[2] + n for n in keeps], [blocks[2] + n for n in decays]),
        ]
    ):
        scale = 0.5 ** (4 - depth)
        rows.append((scale, 0.0, full_names('backbone.', *kept)))
        rows.append((scale, 0.1, full_names('backbone.', *decayed)))
    norms = [
        f'backbone.outnorm{i}.{leaf}' for i in (0, 1) for leaf in ('weight', 'bias')
    ]
    rows.append((1.0, 0.0, full_names('', *norms, 'neck.bias', *HEAD_KEEPS)))
    rows.append((1.0, 0.1, HEAD_DECAYS))
    assert table(groups_of(segmentor(backbone))) == rows


def test_mlla_by_its_published_names():
    names = [name for name, _ in Case('mlla_t_feats').meta['state_dict']]
    depths, last = find_depths(names, 'MLLA')
    assert last == 2 + 4 + 8 + 4 + 1
    for name, depth in (
        ('patch_embed.conv1.conv.weight', 0),
        ('layers.0.blocks.0.attn.qk.weight', 1),
        ('layers.0.blocks.1.norm1.weight', 2),
        ('layers.1.blocks.0.norm1.weight', 3),
        ('layers.3.blocks.3.mlp.fc1.weight', 18),
        ('norm3.weight', 19),
    ):
        assert name in depths and depths[name] == depth, name
    between = [n for n in names if 'downsample' in n and n.startswith('layers.0.')]
    assert between and {depths[n] for n in between} == {3}


def test_published_grouping_of_vim():
    """Blocks at full rate, position embedding decayed, as it happens there."""
    backbone = Vim(PLAIN, img_size=16, last_layer_process='norm')
    rows = table(groups_of(segmentor(backbone), published_vim_grouping=True))
    blocks = [f'backbone.layers.{i}.' for i in range(2)]
    logs = ('mixer.A_log', 'mixer.A_b_log')
    keeps = [b + n for b in blocks for n in MIXER_KEEPS if n not in logs]
    decays = [b + n for b in blocks for n in (*MIXER_DECAYS, *logs)]
    assert rows == [
        (0.125, 0.0, 'backbone.patch_embed.proj.bias'),
        (0.125, 0.1, 'backbone.patch_embed.proj.weight backbone.pos_embed'),
        (
            1.0,
            0.0,
            full_names('', *keeps, 'backbone.norm_f.weight', 'neck.bias', *HEAD_KEEPS),
        ),
        (1.0, 0.1, full_names('', *decays, *HEAD_DECAYS.split())),
    ]


def test_published_rates_of_vim():
    """25 steps from the stem to the head, as in the detection recipe."""
    with torch.device('meta'):
        model = segmentor(mmvssm.build_backbone('vim_t'))
    scales = {}
    for group in groups_of(model, rate=0.837):
        scales |= dict.fromkeys(group['param_names'], group['lr'])
    assert scales['backbone.pos_embed'] == pytest.approx(0.837**25)
    for i in range(24):
        name = f'backbone.layers.{i}.mixer.A_log'
        assert scales[name] == pytest.approx(0.837 ** (25 - (i + 1)))
    assert scales['decode_head.0.weight'] == 1


@pytest.mark.parametrize('name', mmvssm.list_models())
def test_every_parameter_is_in_one_group(name):
    with torch.device('meta'):
        net = mmvssm.build_backbone(name)
    groups = groups_of(net)
    found = [n for group in groups for n in group['param_names']]
    assert sorted(found) == sorted(n for n, _ in net.named_parameters())
    assert len(found) == len(set(found))
    scales = [group['lr'] for group in groups]
    assert scales == sorted(scales)


def test_mlla():
    """n = 3 blocks in two stages; convolutions and batch norms among them."""
    arch = dict(depths=(1, 2), dims=8, num_heads=(2, 2), drop_path_rate=0.0)
    groups = groups_of(segmentor(MLLA(arch, out_indices=(0, 1))))
    stem = [
        f'patch_embed.{conv}.'
        for conv in ('conv1', 'conv2.0', 'conv2.1', 'conv3.0', 'conv3.1')
    ]
    weights = ('cpe1', 'in_proj', 'act_proj', 'dwc', 'attn.qk', 'attn.lepe')
    weights += ('out_proj', 'cpe2', 'mlp.fc1', 'mlp.fc2')
    norms = ('norm1', 'norm2')
    keeps = [f'{n}.bias' for n in weights + norms] + [f'{n}.weight' for n in norms]
    decays = [f'{n}.weight' for n in weights]
    down = [f'layers.0.downsample.conv.{i}.' for i in range(3)]
    blocks = [f'layers.{i}.blocks.{j}.' for i, j in ((0, 0), (1, 0), (1, 1))]
    # No decay and decay of the stem, then of the blocks.
    kept = [
        [s + f'norm.{leaf}' for s in stem for leaf in ('weight', 'bias')],
        *([block + n for n in keeps] for block in blocks),
    ]
    decayed = [
        [s + 'conv.weight' for s in stem],
        *([block + n for n in decays] for block in blocks),
    ]
    kept[2].extend(d + 'conv.bias' for d in down)
    kept[2].extend(down[2] + f'norm.{leaf}' for leaf in ('weight', 'bias'))
    decayed[2].extend(d + 'conv.weight' for d in down)
    rows = []
    for depth, (keep, decay) in enumerate(zip(kept, decayed)):
        scale = 0.5 ** (4 - depth)
        rows.append((scale, 0.0, full_names('backbone.', *keep)))
        rows.append((scale, 0.1, full_names('backbone.', *decay)))
    output = [f'backbone.norm{i}.{leaf}' for i in (0, 1) for leaf in ('weight', 'bias')]
    rows.append((1.0, 0.0, full_names('', 'neck.bias', *output, *HEAD_KEEPS)))
    rows.append((1.0, 0.1, HEAD_DECAYS))
    assert table(groups) == rows


def test_frozen_parameters_are_left_out():
    groups = groups_of(segmentor(Vim(PLAIN, img_size=16, frozen_stages=1)))
    names = [n for group in groups for n in group['param_names']]
    assert not [n for n in names if 'patch_embed' in n or 'layers.0.' in n]
    assert 'backbone.pos_embed' not in names


# Weights by hand for Vim: 16 position vectors of 8 channels, a class token with one
# more and 8 biases; a 4x4 convolution of 3 channels to 8; then two blocks.
PRINTED = {
    'vmamba': """\
group                 lr scale   decay  tensors    weights
depth 0, no decay      0.06250       0        6         36
depth 0, decay         0.06250     0.1        2        396
depth 1, no decay      0.12500       0       11        184
depth 1, decay         0.12500     0.1        7        840
depth 2, no decay      0.25000       0       14        416
depth 2, decay         0.25000     0.1        8       4112
depth 3, no decay      0.50000       0       11        368
depth 3, decay         0.50000     0.1        7       2960
depth 4, no decay      1.00000       0        8         68
depth 4, decay         1.00000     0.1        2         96""",
    'vim': """\
group                 lr scale   decay  tensors    weights
depth 0, no decay      0.12500       0        3        152
depth 0, decay         0.12500     0.1        1        384
depth 1, no decay      0.25000       0        9        168
depth 1, decay         0.25000     0.1        8        704
depth 2, no decay      0.50000       0        9        168
depth 2, decay         0.50000     0.1        8        704
depth 3, no decay      1.00000       0        5         28
depth 3, decay         1.00000     0.1        2         96""",
    'mambar': """\
group                 lr scale   decay  tensors    weights
depth 0, no decay      0.12500       0        4        328
depth 0, decay         0.12500     0.1        1        384
depth 1, no decay      0.25000       0        9        168
depth 1, decay         0.25000     0.1        8        704
depth 2, no decay      0.50000       0        9        168
depth 2, decay         0.50000     0.1        8        704
depth 3, no decay      1.00000       0        5         28
depth 3, decay         1.00000     0.1        2         96""",
}
NORMED = dict(last_layer_process='norm')
PRINTED_MODELS = {
    'vmamba': lambda: VSSM(SCAN, out_indices=(0, 1)),
    'vim': lambda: Vim(PLAIN, img_size=16, cls_token='middle', **NORMED),
    'mambar': lambda: MambaR(PLAIN, img_size=16, **NORMED),
}


@pytest.mark.parametrize('family', PRINTED)
def test_printed_table(family):
    groups = groups_of(segmentor(PRINTED_MODELS[family]()))
    assert format_groups(groups) == PRINTED[family]


def test_without_weight_decay_of_the_optimizer():
    wrapper = build_optim_wrapper(
        Vim(PLAIN, img_size=16),
        dict(
            constructor='mmvssm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=1.0),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    groups = wrapper.optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0}
    assert 'default' in format_groups([{**groups[0], 'weight_decay': None}])


@pytest.mark.parametrize(
    'paramwise,message',
    [
        (dict(), 'needs a layer_decay_rate'),
        (dict(layer_decay_rate=0.0), r'in \(0, 1\], got 0.0'),
        (dict(layer_decay_rate=1.1), r'in \(0, 1\], got 1.1'),
        (dict(layer_decay_rate=0.9, num_layers=12), "unknown options .'num_layers'"),
    ],
)
def test_wrong_options(paramwise, message):
    cfg = dict(
        constructor='mmvssm.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1.0),
        paramwise_cfg=paramwise,
    )
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(Vim(PLAIN, img_size=16), cfg)


def test_other_models():
    with pytest.raises(CheckpointError, match='the model Linear belongs to none'):
        groups_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='needs the lr'):
        build_optim_wrapper(
            Vim(PLAIN, img_size=16),
            dict(
                constructor='mmvssm.LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='AdamW'),
                paramwise_cfg=dict(layer_decay_rate=0.9),
            ),
        )
