"""What a training will do, against the published settings and schedules."""

import json
import math

import pytest

import warm
from mmvssm import engine
from mmvssm.engine import UsageError
from tiny import REPO
from toy import EPOCHS, write_toy

pytest.importorskip('mmseg')


def recipe(name, *, options=None, **settings):
    cfg = engine.load_config(str(REPO / 'configs' / f'{name}.py'), options)
    return engine.read_recipe(cfg, **settings)


def check(found, rate):
    """Every rate, of every group of parameters, is that of a formula."""
    for row in found['schedule']:
        for value, group in zip(row['lr'], found['groups'], strict=True):
            expected = rate(row['iteration']) * group['lr_mult']
            where = row['iteration']
            assert value == pytest.approx(expected, rel=1e-9, abs=1e-18), where


def warm_up(t, steps, first):
    """mmengine's linear warm-up is over one step before it ends."""
    return first + (1 - first) * min(t / (steps - 1), 1)


def segmentor(peak, length):
    def rate(t):
        if t < 1500:
            return peak * warm_up(t, 1500, 1e-6)
        return peak * (1 - (t - 1500) / (length - 1500 - 1))

    return rate


@pytest.mark.parametrize(
    'name,peak,decay,length,batch',
    [
        ('upernet_vmamba_t', 6e-5, 0.01, 160000, (8, 2)),
        ('upernet_mlla_b', 6e-5, 0.01, 160000, (8, 2)),
        ('upernet_vim_t', 1e-4, 0.05, 60000, (4, 8)),
    ],
)
def test_published_segmentors(name, peak, decay, length, batch):
    at = [0, 1, 1499, 1500, 1501]
    if name == 'upernet_vmamba_t':  # The way to the end takes seconds.
        at += [length // 2, length - 1]
    found = recipe(name, at=at)
    assert [row['iteration'] for row in found['schedule']] == at
    check(found, segmentor(peak, length))
    assert {group['weight_decay'] for group in found['groups']} == {0, decay}
    assert found['length'] == dict(
        epochs=None, iterations_per_epoch=None, iterations=length
    )
    processes, images = batch
    assert found['batch']['processes'] == processes
    assert found['batch']['per_process'] == images
    assert found['batch']['total'] == processes * images
    assert found['images']['number'] == 20210
    assert (found['precision'], found['clip_grad']) == ('float32', None)
    assert found['start'] == [f'mmvssm://{name.removeprefix("upernet_")}'] or (
        found['start'] == ['mmvssm://vmamba_t_s1l8']
    )
    steps = [step.partition('(')[0] for step in found['augmentations']['images']]
    assert steps[2:6] == [
        *('RandomResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion')
    ]


def test_groups_name_every_parameter_once():
    found = recipe('upernet_vim_t', at=[0])
    names = [name for group in found['groups'] for name in group['names']]
    assert len(names) == len(set(names))
    assert sum(g['weights'] for g in found['groups']) == found['model']['parameters']
    depth = {name: g['lr_mult'] for g in found['groups'] for name in g['names']}
    # As many blocks as there are above it, and one for the stem.
    assert depth['backbone.pos_embed'] == pytest.approx(0.92**25, rel=1e-12)
    assert depth['backbone.layers.23.mixer.A_log'] == pytest.approx(0.92, rel=1e-12)
    assert depth['decode_head.conv_seg.weight'] == 1


def test_added_batches_make_the_published_batch_of_one_process():
    found = recipe('upernet_vmamba_t_accum8', at=[0, 12000, 12001])
    assert found['batch'] == dict(per_process=2, processes=1, added_up=8, total=16)
    assert found['length']['iterations'] == 8 * 160000
    assert found['schedule'][1]['lr'][0] == pytest.approx(6e-5, rel=1e-9)


def test_average_of_the_weights():
    found = recipe('upernet_vmamba_t_ema', at=[0])
    (average,) = found['averages']
    assert average['decay'] == pytest.approx(0.9999, rel=1e-12)
    assert average['evaluated'] == 'average'


def detector(name, epochs, steps, warm_steps, batches, peak=1e-4):
    at = [0, 1, warm_steps - 1, warm_steps, warm_steps + 1]
    ends = [step * batches for step in steps]
    at += [x for end in ends for x in (end - 1, end)]
    length = epochs * batches
    found = recipe(name, at=[*at, length // 2, length - 1])

    def rate(t):
        drops = sum(t >= end for end in ends)
        return peak * warm_up(t, warm_steps, 0.001) * 0.1**drops

    check(found, rate)
    assert found['length'] == dict(
        epochs=epochs, iterations_per_epoch=batches, iterations=length
    )
    return found


def test_published_detectors():
    pytest.importorskip('mmdet')
    found = detector('mask_rcnn_vmamba_t_1x', 12, (8, 11), 1000, 7330)
    assert found['images']['number'] == 117266
    detector('mask_rcnn_mlla_t_1x', 12, (8, 11), 500, 7330)
    found = detector('mask_rcnn_vmamba_s_3x', 36, (27, 33), 1000, 7330)
    assert found['batch']['total'] == 16
    for kind in ('fp16', 'bf16'):
        found = recipe(f'mask_rcnn_vmamba_t_1x_{kind}', at=[0])
        assert found['precision'] == dict(fp16='float16', bf16='bfloat16')[kind]


def test_processes_and_images_given():
    pytest.importorskip('mmdet')
    found = recipe('mask_rcnn_vmamba_t_1x', world_size=3, images=100)
    # Batches of two of the 34 images of each.
    assert found['length']['iterations_per_epoch'] == 17
    assert found['batch']['total'] == 6
    # Two batches of numbers more, and the warm-up is not over.
    turns = [row['iteration'] for row in found['schedule']]
    assert {0, 1, 8 * 17, 9 * 17, 11 * 17, 102, 203} <= set(turns)
    assert max(turns) == 203 and turns == sorted(turns)


@pytest.mark.parametrize('more', ['', EPOCHS])
def test_rates_are_those_that_a_training_has(tmp_path, more):
    """Of both kinds of loops, with two schedulers each."""
    cfg = engine.load_config(str(write_toy(tmp_path, more)))
    cfg.work_dir = str(tmp_path / 'out')
    cfg.experiment_name = str(tmp_path)
    # Eleven images, which the toy's batches group in six.
    found = engine.read_recipe(cfg, at=list(range(30)))
    engine.prepare_launch(cfg, 'none')
    runner = engine.build_runner(cfg)
    runner.train()
    history = runner.message_hub.log_scalars['train/lr'].data[0]
    rates = [row['lr'][0] for row in found['schedule']]
    assert rates == pytest.approx(list(history), rel=1e-12, abs=0)
    assert len(set(rates)) > 4


def test_scaled_rates(tmp_path):
    options = ['auto_scale_lr.enable=True']
    found = recipe('upernet_vmamba_t', at=[1500], world_size=2, options=options)
    # A quarter of the batch.
    assert found['schedule'][0]['lr'][0] == pytest.approx(1.5e-5, rel=1e-9)


@pytest.mark.parametrize('at', [[160000], [0, -1]])
def test_iterations_of_no_training_are_refused(at):
    with pytest.raises(
        UsageError, match='this training has the iterations 0 to 159999'
    ):
        recipe('upernet_vmamba_t', at=at)


def test_images_that_are_not_here_are_asked_for():
    pytest.importorskip('mmdet')
    options = [
        'train_dataloader.dataset.type=mmseg.CityscapesDataset',
        'train_dataloader.dataset.data_root=/nowhere',
    ]
    with pytest.raises(UsageError, match='say how many with --images N'):
        recipe('mask_rcnn_vmamba_t_1x', options=options)


def test_tool_prints_text_and_json(tmp_path):
    config = REPO / 'configs/upernet_vmamba_t.py'
    tool = [REPO / 'tools/print_recipe.py', config, '--at', '0', '1500']
    done = warm.run([*tool, '--json'], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['schedule'][1]['lr'][0] == pytest.approx(6e-5, rel=1e-9)
    cfg = engine.load_config(str(config))
    again = json.loads(json.dumps(engine.read_recipe(cfg, at=[0, 1500])))
    assert found == again
    text = engine.format_recipe(found)
    for line in (
        'batch        8 processes x 2 images = 16',
        'starts from  mmvssm://vmamba_t_s1l8',
        '  1500       -      0.01      6e-05',
        '  1. LoadImageFromFile()',
    ):
        assert line in text.splitlines()
    fewer = engine.format_recipe(engine.read_recipe(cfg, at=[0], world_size=3))
    line = 'batch        3 processes x 2 images = 6; the config is for 16'
    assert line in fewer.splitlines()
    assert math.isfinite(found['model']['parameters'])
    assert not list(tmp_path.iterdir())


def test_other_images_have_no_published_number():
    """The quickstart's are laid out as COCO's and as ADE20K's."""
    for name in ('upernet_vmamba_quickstart', 'mask_rcnn_vmamba_quickstart'):
        if name.startswith('mask'):
            pytest.importorskip('mmdet')
        nowhere = ['train_dataloader.dataset.data_root=/nowhere']
        found = recipe(name, at=[0], options=nowhere)
        assert found['images'] == dict(number=None, source='not known')


@pytest.mark.parametrize(
    'options,settings,message',
    [
        ((), dict(world_size=0), 'world_size must be 1 or more, not 0'),
        ((), dict(images=-1), 'images must be 1 or more, not -1'),
        (('model.backbone.arch=x',), {}, 'cannot be carried out: unknown arch .x. of'),
        (('param_scheduler.0.end=0',), {}, 'cannot be carried out: end should be lar'),
    ],
)
def test_mistakes_are_one_sentence(options, settings, message):
    with pytest.raises(UsageError, match=message):
        recipe('upernet_vmamba_t', options=list(options), **settings)


def test_too_few_images(tmp_path):
    cfg = engine.load_config(str(write_toy(tmp_path, EPOCHS)))
    cfg.train_dataloader.batch_sampler = None
    cfg.train_dataloader.drop_last = True
    with pytest.raises(UsageError, match='3 images do not fill one batch of 2 images'):
        engine.read_recipe(cfg, images=3, world_size=4)
