"""Every model of this package as one of timm."""

import argparse
import os
import warnings

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.models import _registry
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver
from torch.testing import assert_close

import mmvssm
import mmvssm.timm
from contributing import run_example
from mmvssm import families
from mmvssm.engine.training.layer_decay import find_depths
from mmvssm.errors import CheckpointError
from mmvssm.registry import MODELS
from mmvssm.zoo import TABLE, download, find
from zoo.loopback import Server
from zoo.test_entries import published_names, serve

NAMES = mmvssm.list_models()
# One of each family.
FEW = ['vmamba_t_s1l8', 'vim_t', 'mambar_t', 'mlla_t']


def image(channels=3, size=(48, 64)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def on_meta(name, **options):
    with torch.device('meta'):
        return timm.create_model(name, **options)


# What is registered


def test_every_model_is_listed():
    assert timm.list_models(module='timm') == sorted(NAMES)
    assert set(timm.list_pretrained()) & set(NAMES) == set(
        mmvssm.list_models(pretrained=True)
    )


@pytest.mark.parametrize('name', NAMES)
def test_config_of_every_model(name):
    cfg = timm.get_pretrained_cfg(name)
    row = TABLE.get(name)
    assert cfg.architecture == name and cfg.num_classes == 1000
    assert cfg.input_size == (3, 224, 224) and cfg.interpolation == 'bicubic'
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert cfg.file == (f'mmvssm://{name}' if row else None)
    whole = row is not None and name.startswith('mambar')
    assert cfg.crop_pct == (1.0 if whole else 0.875)


@pytest.mark.parametrize('name', NAMES)
def test_every_model_is_built(name):
    net = on_meta(name, num_classes=7)
    cfg = net.default_cfg
    assert cfg is net.pretrained_cfg
    stem = net.get_submodule(cfg['first_conv'])
    assert isinstance(stem, torch.nn.Conv2d) and stem.in_channels == 3
    assert net.get_submodule(cfg['classifier']) is net.get_classifier()
    assert net.get_classifier().out_features == 7
    assert net.get_classifier().in_features == net.head_hidden_size
    maps = on_meta(name, features_only=True)
    assert maps.feature_info.reduction() == [4, 8, 16, 32]
    if name.startswith(('vim', 'mambar')):
        assert maps.feature_info.channels() == [net.num_features] * 4
    else:
        channels = [net.num_features // 8 * 2**i for i in range(4)]
        assert maps.feature_info.channels() == channels
    assert 'classifier' not in maps.default_cfg


# The same numbers, by the same names


@pytest.mark.parametrize('name', ['mambar_t', 'mlla_t'])
@torch.no_grad()
def test_checkpoints_go_both_ways(name, tmp_path):
    own = mmvssm.build_classifier(name, num_classes=5).eval()
    net = timm.create_model(name, num_classes=5).eval()
    torch.save(own.state_dict(), tmp_path / 'own.pth')
    other = timm.create_model(
        name, num_classes=5, checkpoint_path=tmp_path / 'own.pth'
    ).eval()
    x = image()
    expected = own(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(other.forward_head(other.forward_features(x)), expected)

    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    args = argparse.Namespace(model=name)
    saver = CheckpointSaver(net, optimizer, args=args, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    report = mmvssm.load_checkpoint(own, tmp_path / 'last.pth.tar')
    assert not report.missing and not report.unexpected
    assert torch.equal(own(x), net(x)) and not torch.equal(own(x), expected)

    backbone = mmvssm.build_backbone(name)
    report = mmvssm.load_checkpoint(backbone, tmp_path / 'last.pth.tar')
    assert report.missing == report.new_by_design


@torch.no_grad()
def test_maps_are_those_of_the_backbone():
    maps = timm.create_model('vmamba_t_s1l8', features_only=True, in_chans=4).eval()
    own = mmvssm.build_backbone('vmamba_t_s1l8', in_channels=4).eval()
    report = mmvssm.load_checkpoint(own, maps.state_dict())
    assert not report.missing and not report.unexpected
    x = image(4)
    for mine, theirs in zip(maps(x), own(x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ('indices', 'found'),
    [((0, 2), (0, 2)), (2, (2, 3)), ([-1, 1], (1, 3))],
)
def test_out_indices(indices, found):
    for name in ('mlla_t', 'vim_t'):
        maps = timm.create_model(name, features_only=True, out_indices=indices)
        outs = maps(image(size=(64, 96)))
        assert maps.feature_info.out_indices == found
        assert [out.shape[1] for out in outs] == maps.feature_info.channels()
        strides = maps.feature_info.reduction()
        assert strides == [4 * 2**i for i in found]
        sizes = [(64 // stride, 96 // stride) for stride in strides]
        assert [tuple(out.shape[2:]) for out in outs] == sizes
        if maps.neck is not None:
            assert maps.neck.scales == tuple(16 / stride for stride in strides)
        sum(out.square().mean() for out in outs).backward()
        # No parameter that a loss cannot reach, so DDP works as it is.
        assert all(p.grad is not None for p in maps.parameters())


@torch.no_grad()
def test_overlapping_patches_give_whole_strides():
    maps = timm.create_model('vim_t_stride8', features_only=True)
    sizes = [tuple(out.shape[2:]) for out in maps(image(size=(64, 96)))]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3)]


@torch.no_grad()
def test_isotropic_maps_without_pyramid():
    options = dict(features_only=True, pyramid=False)
    maps = timm.create_model('vim_t', **options)
    assert maps.feature_info.out_indices == (5, 11, 17, 23)
    last = timm.create_model('vim_t', out_indices=(3, -1), **options)
    assert last.feature_info.out_indices == (3, 23)
    for net, number in ((maps, 4), (last, 2)):
        assert net.feature_info.reduction() == [16] * number
        assert [out.shape for out in net(image())] == [(2, 192, 3, 4)] * number


# Published weights


@pytest.fixture
def served(tmp_path, monkeypatch):
    """vim_t as its published file would be, and its own tensors."""
    monkeypatch.setenv('MMVSSM_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(download, '_PAUSE', 0.0)
    server = Server()
    monkeypatch.setenv('MMVSSM_ZOO_MIRROR', server.address)
    state = mmvssm.build_classifier('vim_t').state_dict()
    serve(server, find('vim_t'), published_names('vim_t', state), tmp_path)
    server.files['/file.pth'] = (tmp_path / 'file.pth').read_bytes()
    yield state
    server.close()


@torch.no_grad()
def test_pretrained(served, tmp_path):
    net = timm.create_model('vim_t', pretrained=True)
    for key, value in net.state_dict().items():
        assert torch.equal(value, served[key]), key

    other = timm.create_model('vim_t', pretrained=True, num_classes=5, in_chans=4)
    own = mmvssm.build_classifier('vim_t', 5, pretrained=True, in_channels=4)
    for key, value in own.state_dict().items():
        same = torch.equal(other.state_dict()[key], value)
        assert same == (not key.startswith('classifier.head.w')), key

    maps = timm.create_model('vim_t', pretrained=True, features_only=True)
    for key, value in maps.backbone.state_dict().items():
        # Maps have no class token, and so no position of it.
        if key != 'pos_embed':
            assert torch.equal(value, served[f'backbone.{key}']), key

    # A published file that the user has.
    file = dict(file=str(tmp_path / 'file.pth'))
    for options in (dict(), dict(in_chans=1, num_classes=3)):
        net = timm.create_model(
            'vim_t', pretrained=True, pretrained_cfg_overlay=file, **options
        )
        key = 'backbone.layers.7.mixer.A_log'
        assert torch.equal(net.state_dict()[key], served[key])
        stem = net.backbone.patch_embed.proj.weight
        assert_close(stem.sum(1), served['backbone.patch_embed.proj.weight'].sum(1))
    # By the address alone, and as the config of timm's own functions.
    for options in (
        dict(
            pretrained_cfg_overlay=dict(
                url=f'{os.environ["MMVSSM_ZOO_MIRROR"]}/file.pth'
            ),
            cache_dir=str(tmp_path / 'timm'),
        ),
        dict(pretrained_cfg=file),
    ):
        net = timm.create_model('vim_t', pretrained=True, **options)
        assert torch.equal(net.state_dict()[key], served[key])


def test_pretrained_encoder_of_smp(served):
    net = smp.Linknet('tu-vim_t', encoder_weights=True, in_channels=1)
    state = net.encoder.model.backbone.state_dict()
    key = 'layers.7.mixer.in_proj.weight'
    assert torch.equal(state[key], served[f'backbone.{key}'])
    stem = served['backbone.patch_embed.proj.weight'].sum(1, keepdim=True)
    assert_close(state['patch_embed.proj.weight'], stem)
    params = smp.encoders.get_preprocessing_params('tu-vim_t')
    assert params['mean'] == [0.485, 0.456, 0.406]


@torch.no_grad()
def test_published_state_dict():
    state = mmvssm.build_classifier('vim_t').state_dict()
    source = dict(state_dict=published_names('vim_t', state))
    net = timm.create_model(
        *('vim_t', True),
        pretrained_cfg_overlay=source,
        num_classes=3,
        in_chans=1,
    )
    key = 'backbone.layers.7.mixer.in_proj.weight'
    assert torch.equal(net.state_dict()[key], state[key])
    stem = state['backbone.patch_embed.proj.weight']
    assert_close(net.backbone.patch_embed.proj.weight, stem.sum(1, keepdim=True))


@torch.no_grad()
def test_folder_of_timm(tmp_path):
    net = timm.create_model('mambar_t', num_classes=3, in_chans=2).eval()
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = image(2)
    assert torch.equal(other(x), net(x))
    own = mmvssm.build_classifier('mambar_t', 3, in_channels=2).eval()
    mmvssm.load_checkpoint(own, tmp_path / 'model.safetensors')
    assert torch.equal(own(x), net(x))


@torch.no_grad()
def test_other_image_size(served):
    net = timm.create_model('vim_t', pretrained=True, img_size=(96, 128))
    assert net.backbone.grid == (6, 8)
    own = mmvssm.build_classifier('vim_t', pretrained=True, img_size=(96, 128))
    x = image(size=(96, 128))
    assert torch.equal(net.eval()(x), own.eval()(x))


def test_what_cannot_be_loaded(served, tmp_path):
    with pytest.raises(RuntimeError, match='No pretrained weights exist for mambar_t'):
        timm.create_model('mambar_t', pretrained=True)
    with pytest.raises(ValueError, match='set the environment variable MMVSSM_CACHE'):
        timm.create_model('vim_t', pretrained=True, cache_dir=tmp_path)
    file = dict(file=str(tmp_path / 'file.pth'))
    with pytest.raises(CheckpointError, match='holds Vim weights, but the model'):
        timm.create_model('mlla_t', pretrained=True, pretrained_cfg_overlay=file)


# The methods of timm's models


@pytest.mark.parametrize('name', FEW)
def test_head(name):
    net = timm.create_model(name, num_classes=6, drop_rate=0.5).eval()
    x = image()
    with torch.no_grad():
        features = net.forward_features(x)
        pooled = net.forward_head(features, pre_logits=True)
        logits = net(x)
    assert features.shape[-1 if net.has_tokens else 1] == net.num_features
    assert pooled.shape == (2, net.head_hidden_size)
    with torch.no_grad():
        assert torch.equal(net.get_classifier()(pooled), logits)
        # Only in training, and only before the last layer.
        net.train()
        dropped = net.forward_head(features, pre_logits=True)
        zeros = (dropped == 0).float().mean()
        assert 0.3 < zeros < 0.7
        assert_close(dropped[dropped != 0], 2 * pooled[dropped != 0])
        net.eval()
        net.reset_classifier(0)
        assert torch.equal(net(x), pooled) and net.num_classes == 0
        none = timm.create_model(name, num_classes=0).eval()
        none.load_state_dict(net.state_dict())
        assert torch.equal(none(x), pooled)
        net.reset_classifier(3)
        assert net(x).shape == (2, 3) and net.num_classes == 3


@torch.no_grad()
def test_features_without_pooling():
    net = timm.create_model('vmamba_t_s1l8', num_classes=0, global_pool='').eval()
    x = image()
    assert_close(net(x).mean((2, 3)), net.classifier.pre_logits(net.backbone(x)[-1]))
    net = timm.create_model('vim_t', num_classes=0, global_pool='').eval()
    assert net(x).shape == (2, 1 + 3 * 4, 192) and net.num_prefix_tokens == 1
    pooled = timm.create_model('vim_t', num_classes=0).eval()
    pooled.load_state_dict(net.state_dict())
    assert torch.equal(net(x)[:, 0], pooled(x))


@pytest.mark.parametrize('options', [dict(num_classes=0, global_pool='max'), {}])
def test_pooling_of_the_head(options):
    with pytest.raises(ValueError, match="global_pool of this VMamba is 'avg'"):
        timm.create_model('vmamba_t_s1l8', **options or dict(global_pool='token'))
    with pytest.raises(ValueError, match="'' for features that are not pooled"):
        on_meta('vim_t', **options or dict(global_pool='avg'))
    with pytest.raises(ValueError, match='set num_classes=0, too, got 1000'):
        on_meta('vim_t', global_pool='')
    net = on_meta('mambar_t', head=dict(pooling='patches'), num_classes=4)
    assert net.head_hidden_size == net.num_features
    with pytest.raises(ValueError, match='set num_classes=0'):
        net.reset_classifier(4, '')


@torch.no_grad()
def test_patches_are_pooled_as_by_our_head():
    options = dict(num_classes=4, head=dict(pooling='patches'))
    net = timm.create_model('mambar_t', **options).eval()
    own = mmvssm.build_classifier('mambar_t', **options).eval()
    own.load_state_dict(net.state_dict())
    assert_close(net(image()), own(image()))


@pytest.mark.parametrize('name', ['mlla_t', 'mambar_t'])
@torch.no_grad()
def test_intermediate_maps(name):
    net = timm.create_model(name, num_classes=0).eval()
    x = image()
    features, maps = net.forward_intermediates(x, indices=(1, -1))
    assert torch.equal(features, net.forward_features(x))
    assert len(maps) == 2
    for out, i in zip(maps, (1, len(net.feature_info) - 1)):
        info = net.feature_info[i]
        size = tuple(-(-side // info['reduction']) for side in x.shape[2:])
        assert out.shape == (2, info['num_chs'], *size)
    if name == 'mlla_t':
        assert torch.equal(maps[1], features)
    else:
        # The maps of segmentation: the outputs of blocks.
        options = dict(out_indices=(1, 5), classification=False)
        backbone = mmvssm.build_backbone(name, **options).eval()
        mmvssm.load_checkpoint(backbone, net.state_dict())
        assert torch.equal(maps[0], backbone(x)[0])
    pairs = net.forward_intermediates(
        x, 1, intermediates_only=True, return_prefix_tokens=True
    )
    assert torch.equal(pairs[0][0], maps[1])
    assert pairs[0][1].shape[:2] == (2, net.num_prefix_tokens)
    with pytest.raises(ValueError, match='without norm in NCHW'):
        net.forward_intermediates(x, norm=True)
    with pytest.raises(ValueError, match='indices go from 0 to'):
        net.forward_intermediates(x, indices=(99,))


@pytest.mark.parametrize('name', FEW)
def test_layer_decay(name):
    """The groups of timm are those of our own constructor."""
    net = on_meta(name)
    parameters = dict(net.named_parameters())
    depths, last = find_depths(parameters, 'the model')
    groups = param_groups_layer_decay(
        net, 0.05, no_weight_decay_list=net.no_weight_decay(), layer_decay=0.5
    )
    names = {id(parameter): key for key, parameter in parameters.items()}
    found = {
        names[id(parameter)]: (group['lr_scale'], group['weight_decay'])
        for group in groups
        for parameter in group['params']
    }
    spared = net.backbone.no_weight_decay()
    assert found == {
        key: (
            0.5 ** (last - depth),
            0.0
            if key.removeprefix('backbone.') in spared or parameters[key].ndim == 1
            else 0.05,
        )
        for key, depth in depths.items()
    }
    assert {scale for scale, _ in found.values()} >= {1.0, 0.5**last}


def test_coarse_groups():
    place = on_meta('vmamba_t_s1l8').group_matcher(coarse=True)
    names = [
        'patch_embed.0.weight',
        *(f'layers.{i}.blocks.1.norm.weight' for i in (0, 2)),
    ]
    assert [place(f'backbone.{name}') for name in names] == [(0,), (0, 0), (0, 2)]
    assert place('classifier.head.weight') == (float('inf'),)


def test_no_weight_decay():
    net = on_meta('vim_t')
    groups = param_groups_weight_decay(
        net, 0.1, no_weight_decay_list=net.no_weight_decay()
    )
    names = {id(parameter): key for key, parameter in net.named_parameters()}
    kept = {names[id(p)] for g in groups if g['weight_decay'] for p in g['params']}
    assert 'backbone.layers.0.mixer.A_log' in kept
    assert not {'backbone.pos_embed', 'backbone.cls_token'} & kept


@pytest.mark.parametrize('name', ['vmamba_t_s1l8', 'vim_t'])
def test_gradient_checkpointing(name):
    net = timm.create_model(name, num_classes=3, drop_path_rate=0.0)
    x = image()
    grads = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        marks = [m.with_cp for m in net.modules() if hasattr(m, 'with_cp')]
        assert marks and set(marks) == {enable}
        net.zero_grad()
        net(x).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    for one, other in zip(*grads):
        assert_close(one, other)


def test_drop_path_rate():
    rates = [
        [m.drop_prob for m in net.modules() if hasattr(m, 'drop_prob')]
        for net in (
            on_meta('vmamba_t_s1l8'),
            on_meta('vmamba_t_s1l8', drop_path_rate=0.4),
            mmvssm.build_classifier('vmamba_t_s1l8', drop_path_rate=0.4),
        )
    ]
    assert rates[1] == rates[2] and rates[0] != rates[1]
    assert max(rates[0]) == pytest.approx(0.2)


def test_dilation_is_refused():
    for options in (dict(), dict(features_only=True)):
        with pytest.raises(ValueError, match='cannot be dilated: leave output_stride'):
            on_meta('vmamba_t_s1l8', output_stride=8, **options)


# Families of others


@pytest.fixture
def registries(monkeypatch):
    """Forgets what a test registers."""
    # What is imported in the test only would be forgotten with it.
    MODELS.import_from_location()
    monkeypatch.setattr(families, '_FAMILIES', dict(families._FAMILIES))
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))
    known = set(timm.list_models())
    yield
    for name in set(timm.list_models()) - known:
        _registry._clear_model_entries(name)
        _registry._model_entrypoints.pop(name)


def test_a_family_registers_by_itself(registries):
    run_example('Adding a family')
    assert 'toy_t' in timm.list_models()
    net = timm.create_model('toy_t', num_classes=3, in_chans=2)
    assert net(image(2)).shape == (2, 3)
    assert net.default_cfg['first_conv'] == 'backbone.patch_embed'
    maps = timm.create_model('toy_t', features_only=True)
    assert maps.feature_info.reduction() == [4, 8]
    assert [out.shape[1] for out in maps(image())] == [16, 32]


def test_a_name_that_timm_has(registries):
    @timm.models.register_model
    def toy_t(pretrained=False, **kwargs):
        return torch.nn.Identity()

    message = "timm has another model 'toy_t': that of mmvssm is 'mmvssm_toy_t' in timm"
    with pytest.warns(UserWarning, match=message):
        run_example('Adding a family')
    assert isinstance(timm.create_model('toy_t'), torch.nn.Identity)
    assert timm.create_model('mmvssm_toy_t', num_classes=2)(image()).shape == (2, 2)


def test_no_name_of_ours_is_one_of_timm():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not [name for name in timm.list_models() if name.startswith('mmvssm')]
