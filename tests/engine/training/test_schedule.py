"""Trainings of another length, and the time of an iteration."""

import math

import pytest
from mmengine.config import Config

from mmvssm import engine
from tiny import REPO, write_ade, write_config

pytest.importorskip('mmseg')


def config(**schedulers):
    return Config(
        dict(
            train_cfg=dict(max_iters=2800, val_interval=700),
            param_scheduler=[
                dict(type='LinearLR', begin=0, end=30),
                dict(type='CosineAnnealingLR', begin=30, end=2800, **schedulers),
            ],
        )
    )


def test_what_ends_with_the_training_ends_with_the_new_one():
    cfg = config(T_max=2800)
    engine.set_iterations(cfg, 1000)
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end) == (0, 30)
    assert (cosine.begin, cosine.end, cosine.T_max) == (30, 1000, 1000)
    assert cfg.train_cfg == dict(max_iters=1000, val_interval=250)


@pytest.mark.parametrize('iterations', [31, 999, 2799])
def test_validations_keep_their_number(iterations):
    cfg = config()
    engine.set_iterations(cfg, iterations)
    validated = range(
        cfg.train_cfg.val_interval, iterations + 1, cfg.train_cfg.val_interval
    )
    assert math.ceil(iterations / cfg.train_cfg.val_interval) == 4
    assert len(validated) in (3, 4)  # mmengine also validates after the last one.


@pytest.mark.parametrize('iterations', [-1, 0, 30])
def test_a_training_that_ends_in_the_warm_up_is_refused(iterations):
    with pytest.raises(engine.UsageError, match=f'{iterations}'):
        engine.set_iterations(config(), iterations)


def test_one_scheduler_and_no_validation():
    cfg = Config(
        dict(
            train_cfg=dict(max_iters=10),
            param_scheduler=dict(type='PolyLR', begin=0, end=10),
        )
    )
    engine.set_iterations(cfg, 4)
    assert cfg.param_scheduler.end == 4 and cfg.train_cfg == dict(max_iters=4)


@pytest.mark.parametrize('name', sorted(REPO.glob('configs/*_quickstart.py')))
def test_quickstarts_train_for_the_longest_of_their_schedules(name):
    cfg = Config.fromfile(name)
    assert cfg.train_cfg.max_iters == max(cfg.schedules)
    assert cfg.training_seconds > 0
    for iterations in cfg.schedules:
        engine.set_iterations(Config.fromfile(name), iterations)


def test_measuring_an_iteration(tmp_path):
    data = write_ade(tmp_path / 'data')
    norm = "type='BN', requires_grad=True"
    cfg = engine.load_config(str(write_config(tmp_path / 'c.py', data, norm=norm)))
    # Fewer images than it takes.
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    before = cfg.to_dict()
    seconds = engine.measure_iteration(cfg, seconds=0.0)
    assert 0 < seconds < math.inf
    assert cfg.to_dict() == before and not (tmp_path / 'work_dirs').exists()
