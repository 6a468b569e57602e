"""MESA: its loss, and a training that is stopped and goes on."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn

from mmvssm import engine
from mmvssm.compat import allow_mmengine_checkpoints
from mmvssm.engine import UsageError
from tiny_cls import model_config
from toy import same_bits

RATIO, CLASSES = 1.5, 3
SMOOTH = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')


@DATASETS.register_module()
class ToyClasses(torch.utils.data.Dataset):
    """Small images whose noise torch draws anew each time."""

    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 16

    def __getitem__(self, index):
        image = torch.full((3, 32, 32), 70.0 * (index % CLASSES))
        image = (image + 60 * torch.rand(3, 32, 32)).byte()
        sample = DataSample().set_gt_label(index % CLASSES)
        return dict(inputs=image, data_samples=sample)


def config(begin=1, **changes):
    """MLLA, which has batch norms, with drop path and mixing."""
    model = model_config('mlla', CLASSES, loss=SMOOTH)
    model.update(type='mmvssm.MESAClassifier', ratio=RATIO, begin=begin)
    model['data_preprocessor'].update(
        type='mmvssm.ClsDataPreprocessor', mixup=0.8, cutmix=1.0, erase=0.25
    )
    model['backbone']['drop_path_rate'] = 0.2
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=model,
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                dataset=dict(type='ToyClasses'),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            optim_wrapper=dict(
                optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=5.0)
            ),
            param_scheduler=dict(
                type='mmvssm.TimmCosineLR',
                warmup=1,
                by_epoch=True,
                convert_to_iter_based=True,
            ),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            default_hooks=dict(
                checkpoint=dict(
                    type='mmvssm.SafeCheckpointHook', by_epoch=False, interval=5
                )
            ),
            custom_hooks=[dict(type='mmvssm.TimmEMAHook', decay=0.6)],
            env_cfg=dict(dist_cfg=dict(backend='gloo')),
            randomness=dict(seed=2),
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


def train(folder, resume=None, **changes):
    cfg = config(**changes)
    cfg.work_dir, cfg.experiment_name = str(folder), str(folder)
    if resume:
        folder.mkdir()
        shutil.copy(resume, folder)
        cfg.resume = True
    engine.prepare_launch(cfg, 'none')
    runner = engine.build_runner(cfg)
    runner.train()
    return runner


def read(path):
    allow_mmengine_checkpoints()
    return torch.load(path)


def test_the_loss_is_that_of_the_formula():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        net, average = (MODELS.build(config(begin=2).model) for _ in range(2))
    net.backbone.drop_path_rate = 0
    images = torch.randn(4, 3, 32, 32)
    scores = torch.rand(4, CLASSES).softmax(1)
    samples = [DataSample().set_gt_score(score) for score in scores]
    net.eval(), average.eval()
    with pytest.raises(UsageError, match='MESAClassifier learns from the average'):
        net(images, samples, mode='loss')
    net.teach(average, epoch=1)
    plain = net(images, samples, mode='loss')
    assert set(plain) == {'loss'}
    net.teach(average, epoch=2)
    losses = net(images, samples, mode='loss')
    assert set(losses) == {'loss', 'loss_mesa'}
    torch.testing.assert_close(losses['loss'], plain['loss'])
    logits = net(images)
    taught = average(images).softmax(1)
    expected = -(taught * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses['loss_mesa'], RATIO * expected)
    losses['loss_mesa'].backward()
    assert all(p.grad is None for p in average.parameters())
    assert all(p.grad is not None for p in net.parameters())
    # The average is no part of the model.
    assert not any('teacher' in name for name in net.state_dict())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in average.modules()
    )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mesa') / 'whole'
    return folder, train(folder)


def test_a_training_learns_from_its_average_after_its_begin(finished):
    folder, runner = finished
    assert runner.iter == 12
    history = runner.message_hub.log_scalars['train/loss_mesa'].data[0]
    # Four batches an epoch, and the first is without.
    assert len(history) == 8 and torch.isfinite(torch.as_tensor(history)).all()
    hook = next(h for h in runner.hooks if type(h).__name__ == 'TimmEMAHook')
    average = hook.ema_model.module
    assert not average.training and runner.model.training
    assert runner.model.teacher.func is average
    saved = read(folder / 'iter_10.pth')
    (mean,) = [n for n in saved['state_dict'] if n.endswith('running_mean')][:1]
    assert not torch.equal(
        saved['state_dict'][mean], saved['ema_state_dict'][f'module.{mean}']
    )


@pytest.mark.parametrize('name', ['iter_5.pth', 'iter_10.pth'])
def test_resuming_ends_with_the_same_bits(finished, name, tmp_path):
    folder, runner = finished
    again = train(tmp_path / 'again', resume=folder / name)
    assert again.iter == 12
    assert same_bits(again.model.state_dict(), runner.model.state_dict())
    hooks = [
        next(h for h in r.hooks if type(h).__name__ == 'TimmEMAHook')
        for r in (again, runner)
    ]
    assert same_bits(*(h.ema_model.state_dict() for h in hooks))


def test_without_mesa_it_ends_elsewhere(finished, tmp_path):
    """Or the test of resuming would show nothing of MESA."""
    _, runner = finished
    other = train(tmp_path / 'plain', begin=9)
    assert not same_bits(other.model.state_dict(), runner.model.state_dict())


def test_iterations_have_no_epoch_to_begin_at(tmp_path):
    loop = dict(type='IterBasedTrainLoop', max_iters=3)
    cfg = config()
    cfg.train_cfg = Config(dict(loop=loop)).loop
    cfg.train_dataloader.sampler.type = 'InfiniteSampler'
    cfg.param_scheduler = None
    cfg.work_dir = str(tmp_path)
    engine.prepare_launch(cfg, 'none')
    with pytest.raises(UsageError, match='IterBasedTrainLoop has none: set train_cfg'):
        engine.build_runner(cfg).train()


def test_no_hook_for_the_average_is_refused(tmp_path):
    with pytest.raises(UsageError, match='add dict.type=.mmvssm.TimmEMAHook'):
        train(tmp_path / 'none', custom_hooks=[])


@pytest.mark.parametrize('options', [dict(ratio=-1.0), dict(begin=-1)])
def test_settings_out_of_range_are_refused(options):
    model = config().model
    model.update(options)
    with (
        DefaultScope.overwrite_default_scope('mmpretrain'),
        pytest.raises(UsageError, match='a ratio above 0 and a begin of 0 or more'),
    ):
        MODELS.build(model)


def test_shards_are_refused(tmp_path):
    cfg = config(strategy=dict(type='mmvssm.FSDPStrategy'))
    cfg.work_dir, cfg.launcher = str(tmp_path), 'pytorch'
    with pytest.raises(UsageError, match='EMAHook copies the whole model'):
        engine.build_runner(cfg)
