"""Our learning rates and averages beside timm's own."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEma
from torch import nn

from mmvssm.engine import TimmCosineLR, TimmEMAHook

STEPS, WARM = 30, 5


@pytest.mark.parametrize('prefix', [False, True])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_rates_are_timms(prefix, by_epoch):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    rates = dict(lr=1e-3, params=weights[:1]), dict(lr=2e-4, params=weights[1:])
    theirs, ours = (torch.optim.AdamW([dict(r) for r in rates]) for _ in range(2))
    timm = CosineLRScheduler(
        theirs,
        t_initial=STEPS - WARM if prefix else STEPS,
        lr_min=1e-5,
        warmup_t=WARM,
        warmup_lr_init=1e-6,
        warmup_prefix=prefix,
        cycle_limit=1,
        t_in_epochs=by_epoch,
    )
    own = TimmCosineLR(
        ours,
        warmup=WARM,
        warmup_lr=1e-6,
        eta_min=1e-5,
        warmup_prefix=prefix,
        end=STEPS,
        by_epoch=by_epoch,
    )
    for step in range(STEPS):
        found = [group['lr'] for group in ours.param_groups]
        expected = [group['lr'] for group in theirs.param_groups]
        assert found == pytest.approx(expected, rel=1e-12, abs=0), step
        ours.step(), theirs.step()
        own.step()
        # As the published trainings do: the number of the step that was done.
        timm.step(step) if by_epoch else timm.step_update(step)


def test_averages_are_timms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    timm = ModelEma(net, decay=0.9)
    hook = TimmEMAHook(0.9)

    class Runner:
        model = net

    hook.before_run(Runner)
    hook.ema_model.momentum = 0.1
    hook.ema_model.update_parameters(net)  # What comes before a training.
    for _ in range(5):
        with torch.no_grad():
            for value in net.parameters():
                value += torch.randn_like(value)
        net(torch.randn(6, 3))
        timm.update(net)
        hook.ema_model.update_parameters(net)
    found = hook.ema_model.module.state_dict()
    for name, value in timm.ema.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
