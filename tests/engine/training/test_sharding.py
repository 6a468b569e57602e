"""Two processes that share the weights train what two with all of them train."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image

from mmvssm import engine
from mmvssm.engine.training.sharding import find_blocks, find_units
from tiny import REPO, write_ade, write_config
from toy import environment, same_bits, train_pair

pytest.importorskip('mmseg')

# Mamba®-L made small. Images are tested in windows, of which one image has more
# than the others. No norm mixes images.
_RECIPE = """
model.update(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, depth=4), img_size=64,
        out_indices=(0, 1, 2, 3), drop_path_rate=0.,
        init_cfg=dict(_delete_=True)),
    neck=dict(channels=16),
    test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(43, 43)))
model['decode_head']['in_channels'] = [16] * 4
model['auxiliary_head']['in_channels'] = 16
del test_pipeline[1]
train_dataloader.update(sampler=dict(shuffle=False), batch_size=1)
custom_imports = dict(imports=['record'])
custom_hooks = [dict(type='Record')]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=.5))
param_scheduler = [
    dict(type='LinearLR', start_factor=.1, by_epoch=False, begin=0, end=8)]
train_cfg = dict(max_iters=6, val_interval=6)
default_hooks['checkpoint'].update(interval=3, save_best='mIoU')
"""

# The weights by their parts, and what a rank saw.
_RECORD = """
import json
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Record(Hook):

    priority = 'VERY_HIGH'
    losses, norms = [], []

    def before_train_iter(self, runner, batch_idx, data_batch):
        model = getattr(runner.model, 'module', runner.model)
        block = model.backbone.layers[3]
        self.handle = block.register_forward_hook(
            lambda module, args, out: (out[0] * self.factor, out[1]))
        spoil = batch_idx == int(os.environ.get('NAN_AT', -1)) and runner.rank == 1
        self.factor = float('nan') if spoil else 1

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.handle.remove()
        self.losses.append(float(outputs['loss']))
        self.norms.append(runner.message_hub.get_scalar('train/grad_norm').current())

    def after_train(self, runner):
        held = sum(
            getattr(p, '_local_tensor', p).numel() for p in runner.model.parameters())
        groups = [
            [group['lr_scale'], group['weight_decay'], group['param_names']]
            for group in runner.optim_wrapper.optimizer.param_groups]
        with open(f'{runner.work_dir}/rank{runner.rank}.json', 'w') as file:
            json.dump(dict(
                losses=self.losses, norms=self.norms, held=held, groups=groups,
                wrapper=type(runner.model).__name__,
                miou=runner.message_hub.get_scalar('val/mIoU').current()
            ), file)
"""


def train(folder, config, work_dir, **variables):
    """Train on two ranks; the exit codes of both and the output of rank 0."""
    (first, log), (second, _) = train_pair(
        folder,
        *(f'{config}.py', '--work-dir', work_dir, '--resume'),
        **{**environment(), 'PYTHONPATH': f'{REPO}:{folder}', **variables},
    )
    return (first, second), log


def state(work, run, step=6):
    return torch.load(work / run / f'iter_{step}.pth')


def seen(work, run, rank=0):
    return json.loads((work / run / f'rank{rank}.json').read_text())


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Folder of five trainings.

    They are one of either kind, one of either kind that goes on from the other's
    checkpoint, and one that goes on from its own. One of them skips a batch.
    """
    work = tmp_path_factory.mktemp('sharding')
    (work / 'record.py').write_text(_RECORD)
    write_ade(work / 'ade', train=8, val=3)
    for kind in ('images', 'annotations'):
        (path,) = (work / 'ade' / kind / 'validation').glob('1.*')
        Image.open(path).resize((160, 64), 0).save(path)
    for name in ('mambar_l', 'mambar_l_fsdp'):
        write_config(
            work / f'{name}.py',
            work / 'ade',
            _RECIPE,
            norm="type='GN', num_groups=4, requires_grad=True",
            base=f'upernet_{name}.py',
        )
    skip = "default_hooks['non_finite'] = dict(max_skipped=1)\n"
    text = (work / 'mambar_l_fsdp.py').read_text()
    (work / 'skipping.py').write_text(text + skip)
    ddp, fsdp = 'mambar_l', 'mambar_l_fsdp'
    results = [train(work, ddp, 'ddp'), train(work, fsdp, 'fsdp')]
    for source, goal in (('fsdp', 'again'), ('fsdp', 'without'), ('ddp', 'with')):
        (work / goal).mkdir()
        shutil.copy(work / source / 'iter_3.pth', work / goal)
    results += [
        train(work, fsdp, 'again'),
        train(work, ddp, 'without'),
        train(work, 'skipping', 'with', NAN_AT='4'),
    ]
    for codes, log in results:
        assert codes == (0, 0), log
    (work / 'with/log.txt').write_text(results[-1][1])
    return work


def test_resuming_from_another_model_is_refused(work):
    (work / 'other').mkdir()
    checkpoint = state(work, 'fsdp', 3)
    del checkpoint['state_dict']['backbone.layers.3.norm.weight']
    torch.save(checkpoint, work / 'other/iter_3.pth')
    codes, log = train(work, 'mambar_l_fsdp', 'other')
    assert codes == (2, 2)
    assert 'backbone.layers.3.norm.weight' in log and 'of another model' in log


@pytest.fixture
def cfg(work, monkeypatch):
    monkeypatch.syspath_prepend(str(work))
    return engine.load_config(str(work / 'mambar_l_fsdp.py'))


@pytest.mark.parametrize('rank', [0, 1])
def test_losses_are_those_of_ddp(work, rank):
    """Equal but for rounding.

    Both ways halve the gradients and add two of them, which has one order only;
    but norms of all gradients are summed up in another one.
    """
    whole, sharded = seen(work, 'ddp', rank), seen(work, 'fsdp', rank)
    assert sharded['wrapper'] == 'FSDPEncoderDecoder'
    assert whole['wrapper'] == 'MMDistributedDataParallel'
    assert len(sharded['losses']) == 6
    assert sharded['losses'] == pytest.approx(whole['losses'], rel=1e-5)
    # Clipped by the norm of all gradients, not of a shard's, and in each step.
    assert sharded['norms'] == pytest.approx(whole['norms'], rel=1e-5)
    assert min(whole['norms']) > 0.5


def test_each_rank_holds_a_part(work):
    total = seen(work, 'ddp')['held']
    parts = [seen(work, 'fsdp', rank)['held'] for rank in (0, 1)]
    assert sum(parts) == total
    assert max(parts) < 0.6 * total


def test_learning_rates_and_decay_are_those_of_the_whole_parameters(work):
    groups = seen(work, 'ddp')['groups']
    assert seen(work, 'fsdp')['groups'] == seen(work, 'fsdp', 1)['groups'] == groups
    assert len({scale for scale, *_ in groups}) == 6
    assert any(decay == 0 for _, decay, _ in groups)


@pytest.mark.parametrize('step', [3, 6])
def test_checkpoints_are_those_of_ddp(work, step):
    whole, sharded = state(work, 'ddp', step), state(work, 'fsdp', step)
    assert set(sharded) == set(whole)
    near = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sharded['state_dict'], whole['state_dict'], **near)
    moments, others = (x['optimizer'].pop('state') for x in (sharded, whole))
    torch.testing.assert_close(moments, others, **near)
    assert sharded['optimizer']['param_groups'] == whole['optimizer']['param_groups']
    assert sharded['param_schedulers'] == whole['param_schedulers']
    assert sharded['meta']['iter'] == step


def test_resuming_ends_with_the_same_bits(work):
    ended, again = state(work, 'fsdp'), state(work, 'again')
    assert seen(work, 'again')['losses'] == seen(work, 'fsdp')['losses'][3:]
    assert same_bits(ended['state_dict'], again['state_dict'])
    for number, moments in ended['optimizer']['state'].items():
        assert same_bits(moments, again['optimizer']['state'][number])
    before = state(work, 'fsdp', 3)
    assert not same_bits(ended['state_dict'], before['state_dict'])


def test_may_go_on_without_shards(work):
    whole, after = seen(work, 'ddp'), seen(work, 'without')
    assert after['losses'] == pytest.approx(whole['losses'][3:], rel=1e-5)
    assert after['held'] == whole['held']


def test_may_go_on_with_shards_and_skips_a_loss_that_is_not_finite(work):
    log = (work / 'with/log.txt').read_text()
    assert 'loss not finite in iteration 5: rank 1: loss nan' in log
    assert 'first in backbone.layers.3 (' in log
    whole, after = seen(work, 'ddp', 1), seen(work, 'with', 1)
    assert after['held'] < whole['held']
    fourth, fifth, sixth = after['losses']
    assert fourth == pytest.approx(whole['losses'][3], rel=1e-5)
    assert math.isnan(fifth)
    # One update less than in the other.
    assert 1e-4 < abs(sixth - whole['losses'][5]) < 0.1


def test_validates_in_windows_of_any_number(work):
    """Rank 1 has the wide image, and more windows than rank 0."""
    assert seen(work, 'fsdp')['miou'] == pytest.approx(seen(work, 'ddp')['miou'])
    assert len(list((work / 'fsdp').glob('best_mIoU*.pth'))) == 1


def test_checkpoint_loads_as_that_of_a_whole_model(work, cfg):
    from mmseg.registry import MODELS

    model = MODELS.build({**cfg.model, '_scope_': 'mmseg'})
    engine.load_weights(model, str(work / 'fsdp/iter_6.pth'))
    saved = state(work, 'fsdp')['state_dict']
    loaded = {
        name: value for name, value in model.state_dict().items() if name in saved
    }
    # No prediction needs the auxiliary head, and it is left out.
    for states in (saved, loaded):
        for name in [name for name in states if name.startswith('auxiliary_head.')]:
            del states[name]
    assert len(saved) > 90 and same_bits(loaded, saved)
    assert len(find_blocks(model)) == 4


def test_needs_several_processes(cfg):
    cfg.launcher = 'none'
    with pytest.raises(engine.UsageError, match='dist_train'):
        engine.build_runner(cfg)


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (dict(custom_hooks=[dict(type='EMAHook')]), 'EMAHook copies'),
        (dict(strategy=dict(type='DeepSpeedStrategy')), 'DeepSpeedStrategy is not'),
    ],
)
def test_what_cannot_be_sharded_is_refused(cfg, changes, says):
    cfg.launcher = 'pytorch'
    cfg.update(changes)
    with pytest.raises(engine.UsageError, match=says):
        engine.build_runner(cfg)


def test_foreign_backbones_are_refused():
    with pytest.raises(engine.UsageError, match=r'strategy\.units'):
        find_blocks(torch.nn.Linear(1, 1))


def test_units_by_their_names():
    net = torch.nn.Module()
    net.stages = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.ReLU()) for _ in '12')
    assert find_units(net, ['stages.*']) == list(net.stages)
    assert find_units(net, ['stages.1', 'stages.0.0']) == [
        net.stages[1],
        net.stages[0][0],
    ]
    with pytest.raises(engine.UsageError, match="no module of the model is 'blocks'"):
        find_units(net, ['blocks'])
    with pytest.raises(engine.UsageError, match=r'stages\.0\.0 lies within stages\.0'):
        find_units(net, ['stages.*', 'stages.0.0'])


def test_wrappers_are_refused():
    with pytest.raises(engine.UsageError, match='takes no model_wrapper'):
        engine.FSDPStrategy(model_wrapper=dict(type='MMFullyShardedDataParallel'))
