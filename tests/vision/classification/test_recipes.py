"""The configs of the published trainings, against the tables of the papers and code."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import mmvssm
from mmvssm import engine, zoo
from tiny import REPO
from tiny_cls import PARTS

FOLDER = REPO / 'configs/classification'
PARITY = REPO / 'tests/data/parity'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*_in1k.py'))

VMAMBA = dict(
    processes=8,
    images=128,
    epochs=300,
    lr=1e-3,
    first=1e-6,
    last=1e-5,
    warm=20,
    step='iteration',
    prefix=True,
    decay=0.05,
    clip=5.0,
    average=(0.9999, 'average'),
    drop=0.2,
    smooth=0.1,
    erase=0.25,
    augment='RandAugment',
    repeats=False,
    precision='float16',
    crop=(224, 256),
)
VIM = dict(
    VMAMBA,
    warm=5,
    step='epoch',
    prefix=False,
    clip=None,
    average=(0.99996, 'raw'),
    drop=0.0,
    repeats=True,
    precision='float32',
)
STRIDE_8 = dict(VIM, epochs=30, lr=1e-5, first=1e-5, last=1e-5, decay=1e-8)
MAMBAR_1 = dict(
    VIM,
    average=None,
    drop=0.1,
    smooth=0.0,
    erase=0.0,
    augment='mmvssm.ThreeAugment',
    precision='bfloat16',
    crop=(128, 146),
)
MAMBAR_2 = dict(MAMBAR_1, epochs=100, lr=4e-4, drop=0.4, crop=(224, 256))
MAMBAR_3 = dict(
    MAMBAR_2,
    images=64,
    epochs=20,
    lr=1e-5,
    decay=0.1,
    smooth=0.1,
    augment='RandAugment',
    repeats=False,
    crop=(224, 224),
)
MLLA = dict(
    VMAMBA,
    processes=32,
    lr=4e-3,
    first=4e-6,
    last=4e-5,
    prefix=False,
    average=(0.9996, 'average'),
)
# Config -> model of the zoo, and settings.
EXPECTED = {
    'vmamba_t_s1l8': VMAMBA,
    'vmamba_t_s2l5': VMAMBA,
    'vmamba_s_s2l15': dict(VMAMBA, drop=0.3),
    'vmamba_b_s2l15': dict(VMAMBA, drop=0.6),
    'vmamba_s_s1l20': dict(VMAMBA, drop=0.3),
    'vmamba_b_s1l20': dict(VMAMBA, drop=0.5),
    'vmamba_t_v0': dict(VMAMBA, drop=0.1, average=(0.9999, 'raw')),
    'vmamba_s_v0': dict(VMAMBA, drop=0.3),
    'vmamba_b_v0': dict(VMAMBA, drop=0.6),
    'vim_t': dict(VIM, decay=0.1),
    'vim_s': dict(VIM, images=64, drop=0.05),
    'vim_b': dict(VIM, drop=0.05, average=(0.99996, 'average')),
    'vim_t_stride8': STRIDE_8,
    'vim_s_stride8': STRIDE_8,
    **{f'mambar_{size}_stage1': MAMBAR_1 for size in 'tsbl'},
    **{f'mambar_{size}_stage2': MAMBAR_2 for size in 'tsbl'},
    **{f'mambar_{size}_stage3': MAMBAR_3 for size in 'tsbl'},
    **{f'mambar_{size}_384': dict(MAMBAR_3, crop=(384, 384)) for size in 'bl'},
    'mlla_t': MLLA,
    'mlla_s': dict(MLLA, processes=64, images=64, drop=0.3),
    'mlla_b': dict(MLLA, processes=64, images=64, drop=0.5),
}
STARTS = {
    'vim_t_stride8': 'mmvssm://vim_t',
    'vim_s_stride8': 'mmvssm://vim_s',
    'mambar_b_384': 'mmvssm://mambar_b',
    'mambar_l_384': 'mmvssm://mambar_l',
    **{
        f'mambar_{size}_stage{stage}': f'work_dirs/mambar_{size}_{before}.pth'
        for size in 'tsbl'
        for stage, before in (
            (2, 'stage1_in1k/epoch_300'),
            (3, 'stage2_in1k/epoch_100'),
        )
    },
}


def load(name):
    return engine.load_config(str(FOLDER / f'{name}_in1k.py'))


@cache
def recipe(name):
    return engine.read_recipe(load(name), at=[0])


def model_of(name):
    """The name in ``mmvssm.list_models()``."""
    family, size = name.split('_')[:2]
    return f'mambar_{size}' if family == 'mambar' else name


def test_every_config_has_its_row_here_and_every_model_a_config():
    assert {f'{name}_in1k' for name in EXPECTED} == set(CONFIGS)
    published = ('vmamba', 'vim', 'mambar', 'mlla')
    models = {m for m in mmvssm.list_models() if m.split('_')[0] in published}
    assert {model_of(name) for name in EXPECTED} == models


@pytest.mark.parametrize('name', EXPECTED)
def test_settings(name):
    wanted, found, cfg = EXPECTED[name], recipe(name), load(name)
    with torch.device('meta'):
        net = mmvssm.build_classifier(model_of(name), img_size=wanted['crop'][0])
    own = sum(p.numel() for p in net.parameters())
    assert found['model']['parameters'] == found['model']['trained'] == own
    assert found['model']['drop_path_rate'] == wanted['drop']
    assert found['batch'] == dict(
        per_process=wanted['images'],
        processes=wanted['processes'],
        added_up=1,
        total=wanted['images'] * wanted['processes'],
    )
    assert found['images']['number'] == 1281167
    length = found['length']
    batches = 1281167 // found['batch']['total']
    # As VMamba's and Vim's scripts count them at a batch of 1024.
    assert found['batch']['total'] != 1024 or batches == 1251
    assert length['iterations_per_epoch'] == batches
    assert length['epochs'] == wanted['epochs']
    optimizer = found['optimizer']
    assert (optimizer['type'], optimizer['lr']) == ('AdamW', wanted['lr'])
    assert tuple(optimizer['betas']) == (0.9, 0.999) and optimizer['eps'] == 1e-8
    assert {g['weight_decay'] for g in found['groups']} == {0, wanted['decay']}
    assert found['clip_grad'] == (wanted['clip'] and dict(max_norm=wanted['clip']))
    assert found['precision'] == wanted['precision']
    assert found['start'] == ([STARTS[name]] if name in STARTS else [])
    averages = [(x['decay'], x['evaluated']) for x in found['averages'] if 'decay' in x]
    assert averages == ([wanted['average']] if wanted['average'] else [])
    assert cfg.model.head.loss.label_smooth_val == wanted['smooth']
    assert cfg.randomness == dict(seed=0, diff_rank_seed=True)


@pytest.mark.parametrize('name', EXPECTED)
def test_augmentations(name):
    wanted, found, cfg = EXPECTED[name], recipe(name), load(name)
    steps = found['augmentations']['images']
    side, resized = wanted['crop']
    assert [step.partition('(')[0] for step in steps] == [
        'LoadImageFromFile',
        'RandomResizedCrop',
        'RandomFlip',
        wanted['augment'],
        'PackInputs',
    ]
    assert steps[1] == (
        f'RandomResizedCrop(scale={side}, backend=pillow, interpolation=bicubic)'
    )
    erase = ['erase(0.25)'] if wanted['erase'] else []
    assert found['augmentations']['batches'] == [*erase, 'mixup(0.8)', 'cutmix(1)']
    sampler = 'mmvssm.DeiTRepeatAugSampler' if wanted['repeats'] else 'DefaultSampler'
    assert cfg.train_dataloader.sampler.type == sampler
    assert cfg.train_dataloader.drop_last
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        load_, resize, crop, _ = loader.dataset.pipeline
        assert load_ == cfg.train_dataloader.dataset.pipeline[0]
        assert (resize.scale, crop.crop_size) == (resized, side)
        assert (resize.edge, resize.interpolation) == ('short', 'bicubic')


def test_evaluation_is_that_of_the_zoo():
    for name in EXPECTED:
        row = zoo.TABLE.get(model_of(name))
        if row is None or row.crop is None or 'stage1' in name or 'stage2' in name:
            continue
        cfg = load(name)
        _, resize, crop, _ = cfg.test_dataloader.dataset.pipeline
        if name.endswith('_384'):
            assert row.crop.ratio == 1 and resize.scale == crop.crop_size == 384
        else:
            assert (resize.scale, crop.crop_size) == (row.crop.resized, row.crop.size)


@pytest.mark.parametrize('name,ratio', [('mlla_t', 1), ('mlla_s', 1.5), ('mlla_b', 2)])
def test_mesa(name, ratio):
    _, mesa = recipe(name)['averages']
    assert mesa == dict(type='MESAClassifier', begin=int(0.25 * 300), ratio=ratio)


# Rates


def rate(t, wanted, batches):
    """timm's, of which each step learns with that of the step before."""
    unit = 1 if wanted['step'] == 'iteration' else batches
    t = max(t // unit - 1, 0)
    warm = wanted['warm'] * batches // unit
    length = wanted['epochs'] * batches // unit
    first, peak, last = wanted['first'], wanted['lr'], wanted['last']
    if t < warm:
        return first + t * (peak - first) / warm
    if wanted['prefix']:
        t, length = t - warm, length - warm
    return last + 0.5 * (peak - last) * (1 + math.cos(math.pi * t / length))


def check_rates(name, batches, *more):
    wanted = EXPECTED[name]
    warm, length = wanted['warm'] * batches, wanted['epochs'] * batches
    at = [0, 1, warm, warm + 1, length // 2, length - 1, *more]
    images = wanted['images'] * wanted['processes'] * batches
    found = engine.read_recipe(load(name), at=at, images=images)
    assert found['length']['iterations'] == length
    for row in found['schedule']:
        expected = rate(row['iteration'], wanted, batches)
        for value, decay in zip(row['lr'], row['weight_decay'], strict=True):
            assert value == pytest.approx(expected, rel=1e-9, abs=0), row['iteration']
            assert decay in (0, wanted['decay'])
    return {row['iteration']: row['lr'][0] for row in found['schedule']}


@pytest.mark.parametrize(
    'name',
    ['vmamba_t_s1l8', 'vmamba_b_v0', 'vim_t', 'vim_s', 'vim_t_stride8', 'mlla_t']
    + ['mambar_b_stage1', 'mambar_b_stage2', 'mambar_b_stage3', 'mambar_l_384'],
)
def test_rates(name):
    """With epochs of ten batches; those of ImageNet have the same formula."""
    wanted = EXPECTED[name]
    warm = 10 * wanted['warm']
    found = check_rates(name, 10, 10, 11, warm + 9, warm + 10)
    assert found[0] == found[1] == wanted['first']
    if name == 'vim_t_stride8':
        assert set(found.values()) == {1e-5}
    if wanted['step'] == 'epoch':
        assert found[10] == found[0] and found[warm] == found[warm + 9]
        # The last epoch of the warm-up came one late.
        assert found[warm] <= found[warm + 10]
    elif wanted['prefix']:
        assert found[warm + 1] == wanted['lr']
    else:
        # The cosine is past its begin when it comes into sight.
        hidden = 0.5 * (1 + math.cos(math.pi * 20 / 300))
        expected = wanted['last'] + (wanted['lr'] - wanted['last']) * hidden
        assert found[warm + 1] == pytest.approx(expected, rel=1e-9)


def test_rates_of_vim_on_imagenet():
    found = check_rates('vim_t', 1251, 1250, 2502)
    assert found[1250] == 1e-6
    assert found[2502] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5, rel=1e-9)


@pytest.mark.parametrize('name,batches', [('vmamba_t_s1l8', 1251), ('mlla_t', 312)])
def test_rates_of_all_iterations_on_imagenet(name, batches):
    length = 300 * batches
    found = check_rates(name, batches)
    assert found[length // 2] > found[length - 1] > EXPECTED[name]['last']


# Groups


@pytest.mark.parametrize(
    'name,case,spared',
    [
        ('vmamba_t_v0', 'vmamba_t_v0', {'pos_embed'}),
        ('vmamba_t_s1l8', 'vmamba_t_s1l8', {'pos_embed'}),
        ('vim_t', 'vim_t', {'pos_embed', 'cls_token'}),
        ('mambar_s_stage2', 'mambar_s', {'pos_embed', 'cls_token', 'pos_embed_cls'}),
        ('mlla_t', 'mlla_t', {'absolute_pos_embed'}),
    ],
)
def test_weight_decay_is_that_of_the_published_names(name, case, spared):
    """Tensors of a published file go into the model, and tell their names there."""
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    about = json.loads((PARITY / f'{case}_logits.json').read_text())
    shapes = {key: tuple(shape) for key, shape in about['state_dict']}
    keys = list(shapes)
    state = {
        key: torch.full(shape, float(index))
        for index, (key, shape) in enumerate(shapes.items())
    }
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        net = MODELS.build(load(name).model)
    mmvssm.load_checkpoint(net, state)
    decay = {
        key: group['weight_decay']
        for group in recipe(name)['groups']
        for key in group['names']
    }
    seen = set()
    for own, value in net.named_parameters():
        key = keys[int(value.detach().flatten()[0])]
        exempt = len(shapes[key]) == 1 or key.endswith('.bias') or key in spared
        assert (decay[own] == 0) == exempt, (own, key)
        seen.add(key)
    assert len(seen) == len(decay)
    decayed = {
        key for key in seen if key.endswith(('A_log', 'A_logs', 'dt_projs_bias'))
    }
    assert case == 'mlla_t' or decayed


# A step


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Eight images of two classes, for training and validation."""
    root = tmp_path_factory.mktemp('imagenet')
    draw = np.random.default_rng(0)
    for split in ('train', 'val'):
        for wnid in ('n01', 'n02'):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = draw.integers(0, 256, (50, 44, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{number}.JPEG')
    return root


def shrink(cfg, root, work_dir):
    """The same recipe, of a model and images so small that it takes a second."""
    family = (
        cfg.model.backbone.type.rpartition('.')[2].lower().replace('vssm', 'vmamba')
    )
    backbone, head = PARTS[family]
    backbone = {k: v for k, v in backbone.items() if k != 'drop_path_rate'}
    cfg.model.backbone.update(backbone)
    cfg.model.head = dict(head, loss=cfg.model.head.loss, num_classes=2)
    cfg.model.data_preprocessor.num_classes = 2
    for split, size in (('train', 2), ('val', 4)):
        loader = cfg[f'{split}_dataloader']
        loader.update(
            num_workers=0, persistent_workers=False, pin_memory=False, batch_size=size
        )
        loader.dataset.data_root = str(root)
        # ImageNet's has a thousand.
        loader.dataset.metainfo = dict(classes=('one', 'two'))
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader.dataset.pipeline[1].scale = 32
    _, resize, crop, _ = cfg.val_dataloader.dataset.pipeline
    resize.scale, crop.crop_size = 36, 32
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler.warmup = 0
    if 'ratio' in cfg.model:
        cfg.model.begin = 0
    if cfg.optim_wrapper.type == 'AmpOptimWrapper':  # On a GPU alone.
        cfg.optim_wrapper.type = 'OptimWrapper'
        del cfg.optim_wrapper['dtype'], cfg.optim_wrapper['loss_scale']
    cfg.load_from = None
    cfg.val_evaluator.topk = (1,)
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.work_dir = cfg.experiment_name = str(work_dir)
    return cfg


@pytest.mark.parametrize(
    'name', ['vmamba_t_s1l8', 'vim_t', 'mambar_b_stage1', 'mambar_l_384', 'mlla_t']
)
def test_an_epoch_of_four_batches(name, imagenet, tmp_path):
    cfg = shrink(load(name), imagenet, tmp_path / 'out')
    engine.prepare_launch(cfg, 'none')
    runner = engine.build_runner(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    assert runner.iter == 4
    moved = [
        name
        for name, value in runner.model.named_parameters()
        if not torch.equal(value, before[name])
    ]
    assert len(moved) == len(list(runner.model.parameters()))
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    saved = tmp_path / 'out/epoch_1.pth'
    assert saved.is_file()
    found = runner.message_hub.get_scalar('val/accuracy/top1').current()
    assert 0 <= found <= 100
    kinds = {'loss', 'loss_mesa'} if name == 'mlla_t' else {'loss'}
    logged = {key.removeprefix('train/') for key in runner.message_hub.log_scalars}
    assert kinds <= logged


@pytest.mark.parametrize(
    'name,before,sides',
    [
        ('mambar_b_stage2', 'mambar_b_stage1', (32, 56)),
        ('mambar_b_384', 'mambar_b_stage3', (56, 96)),
        ('vim_t_stride8', 'vim_t', (32, 32)),
    ],
)
def test_a_training_starts_from_the_one_before(name, before, sides, imagenet, tmp_path):
    """With its head, and position embeddings of another grid."""
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    nets = []
    for config, side in ((before, sides[0]), (name, sides[1])):
        cfg = load(config)
        given = cfg.get('load_from')
        cfg = shrink(cfg, imagenet, tmp_path)
        cfg.model.backbone.img_size = side
        if nets:
            assert given
            if 'stride8' in name:
                cfg.model.backbone.arch.stride = 2
            file = tmp_path / 'before.pth'
            torch.save(dict(state_dict=nets[0].state_dict()), file)
            cfg.load_from = str(file)
            assert engine.choose_start(cfg) == [str(file)]
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            nets.append(MODELS.build(cfg.model))
    nets[1].init_weights()
    old, new = (dict(net.named_parameters()) for net in nets)
    assert old.keys() == new.keys()
    for key, value in new.items():
        if key == 'backbone.pos_embed':
            assert value.shape[1] > old[key].shape[1]
        else:
            assert torch.equal(value, old[key]), key
    if name.startswith('mambar'):
        cells, more = (math.isqrt(x['backbone.pos_embed'].shape[1]) for x in (old, new))
        grid = old['backbone.pos_embed'].detach().unflatten(1, (cells, cells))
        resized = torch.nn.functional.interpolate(
            grid.permute(0, 3, 1, 2), (more, more), mode='bicubic', align_corners=False
        )
        expected = resized.flatten(2).transpose(1, 2)
        torch.testing.assert_close(new['backbone.pos_embed'], expected)
