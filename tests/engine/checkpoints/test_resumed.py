"""Settings that a resumed training does not take from its config."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import LinearLR, OptimWrapper, PolyLR
from torch import nn

from mmvssm.engine import UsageError
from mmvssm.engine.checkpoints.resumed import check_groups, kept_settings
from toy import train_each, write_toy

SAYS = 'resuming keeps settings of the checkpoint that the config has changed: '


def runner(lr=0.1, decay=0.01, betas=(0.9, 0.99), end=10, schedulers=2):
    net = nn.Linear(2, 2)
    groups = [dict(params=[net.weight]), dict(params=[net.bias], lr=lr / 2)]
    options = dict(lr=lr, weight_decay=decay, betas=betas)
    wrapper = OptimWrapper(torch.optim.AdamW(groups, **options))
    made = [
        LinearLR(wrapper, start_factor=0.1, end=3, by_epoch=False),
        PolyLR(wrapper, begin=3, end=end, by_epoch=False),
    ][:schedulers]
    return SimpleNamespace(optim_wrapper=wrapper, param_schedulers=made)


def saved(now):
    """Both after some steps."""
    for _ in range(5):
        for parameter in now.optim_wrapper.param_groups[0]['params']:
            parameter.grad = torch.ones_like(parameter)
        now.optim_wrapper.optimizer.step()
        for scheduler in now.param_schedulers:
            scheduler.step()
    states = [scheduler.state_dict() for scheduler in now.param_schedulers]
    return copy.deepcopy(
        dict(optimizer=now.optim_wrapper.state_dict(), param_schedulers=states)
    )


@pytest.mark.parametrize('schedulers', [0, 1, 2])
def test_nothing_is_said_of_what_moves_by_itself(schedulers):
    before = saved(runner(schedulers=schedulers))
    assert kept_settings(runner(schedulers=schedulers), before) == []
    before['optimizer']['param_groups'][0]['betas'] = [0.9, 0.99]
    assert kept_settings(runner(schedulers=schedulers), before) == []


@pytest.mark.parametrize('schedulers', [0, 2])
@pytest.mark.parametrize(
    ('changed', 'kept'),
    [
        (dict(lr=0.2), ['lr 0.1, not 0.2', 'lr 0.05, not 0.1']),
        (dict(decay=0.0), ['weight_decay 0.01, not 0.0']),
        (dict(betas=(0.9, 0.999)), ['betas (0.9, 0.99), not (0.9, 0.999)']),
    ],
)
def test_settings_of_the_optimizer(changed, kept, schedulers):
    before = saved(runner(schedulers=schedulers))
    assert kept_settings(runner(**changed, schedulers=schedulers), before) == kept


def test_settings_of_schedulers():
    before = saved(runner())
    kept = kept_settings(runner(end=20), before)
    assert 'param_scheduler[1].end 10, not 20' in kept
    assert all(name.startswith('param_scheduler[1].') for name in kept)
    kept = kept_settings(runner(schedulers=1), before)
    assert kept == ['2 param_schedulers, not 1']


def test_other_groups_of_parameters():
    before = saved(runner())
    check_groups(runner(), before)
    other = before['optimizer']['param_groups']
    for groups in (other[:1], [dict(other[0], params=[0, 1]), other[1]]):
        with pytest.raises(UsageError, match='groups of . parameters, and that of the'):
            check_groups(runner(), dict(optimizer=dict(param_groups=groups)))


def test_checkpoint_without_an_optimizer_and_several_optimizers():
    now = runner()
    assert kept_settings(now, {}) == []
    several = SimpleNamespace(optim_wrapper=dict(a=1), param_schedulers=dict(a=[]))
    before = dict(optimizer=dict(a={}), param_schedulers=dict(a=[]))
    assert kept_settings(several, before) == []
    for checkpoint in ({}, before):
        check_groups(now, checkpoint), check_groups(several, checkpoint)


def test_training_says_so_once_it_resumes(tmp_path):
    write_toy(tmp_path, iters=12)
    first = ('SIGTERM@6', '--work-dir', 'out')
    same = ('SIGTERM@8', '--work-dir', 'out', '--resume')
    other = ('', *same[1:], '--cfg-options', 'optim_wrapper.optimizer.lr=0.7')
    rules = 'optim_wrapper.paramwise_cfg=dict(norm_decay_mult=0.0)'
    runs = train_each(tmp_path, first, same, (*other[:-1], rules), other)
    assert [code for code, _ in runs] == [75, 75, 2, 0], runs[-1][1]
    assert 'error: the optimizer of the checkpoint to resume from' in runs[2][1]
    assert [SAYS in log for _, log in runs] == [False, False, False, True]
    assert ', not 0.7; ' in runs[-1][1] or ', not 0.7. ' in runs[-1][1]
