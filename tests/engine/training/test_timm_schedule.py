"""Learning rates of timm's cosine, against its formula."""

import math

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmvssm.engine import TimmCosineLR, UsageError

PEAK, FIRST, LAST, WARM, LENGTH = 1e-3, 1e-6, 1e-5, 4, 20


def wrapper(*rates):
    groups = [
        dict(params=[nn.Parameter(torch.ones(1))], lr=rate) for rate in rates or [PEAK]
    ]
    return OptimWrapper(torch.optim.AdamW(groups))


def rates(steps=LENGTH, optim=None, **options):
    """Rates that so many steps learn with, and the one after them."""
    optim = optim or wrapper()
    options = dict(warmup=WARM, warmup_lr=FIRST, eta_min=LAST, end=LENGTH) | options
    scheduler = TimmCosineLR(optim, **options)
    found = []
    for _ in range(steps + 1):
        found.append([group['lr'] for group in optim.param_groups])
        optim.step()
        scheduler.step()
    return found


def rate(t, prefix, peak=PEAK):
    """timm's rate at its step t."""
    if t < WARM:
        return FIRST + t * (peak - FIRST) / WARM
    length = LENGTH
    if prefix:
        t, length = t - WARM, LENGTH - WARM
    return LAST + 0.5 * (peak - LAST) * (1 + math.cos(math.pi * t / length))


@pytest.mark.parametrize('prefix', [False, True])
@pytest.mark.parametrize('lag', [0, 1])
def test_every_rate_is_that_of_the_formula(prefix, lag):
    found = rates(warmup_prefix=prefix, lag=lag)
    for t in range(LENGTH):
        expected = rate(max(t - lag, 0), prefix)
        assert found[t][0] == pytest.approx(expected, rel=1e-12, abs=0), t
    # Behind the end the last rate stays.
    assert found[LENGTH] == found[LENGTH - 1]
    after = found[WARM + lag][0]
    assert after == PEAK if prefix else after < 0.95 * PEAK


def test_groups_keep_their_own_peaks():
    found = rates(optim=wrapper(PEAK, PEAK / 10), lag=0)
    for t in range(LENGTH):
        for value, peak in zip(found[t], (PEAK, PEAK / 10)):
            assert value == pytest.approx(rate(t, False, peak), rel=1e-12, abs=0)


def test_epochs_become_iterations():
    optim = wrapper()
    scheduler = TimmCosineLR.build_iter_from_epoch(
        optim, warmup=2, end=10, eta_min=LAST, warmup_lr=FIRST, epoch_length=2
    )
    assert not scheduler.by_epoch
    found = []
    for _ in range(LENGTH):
        found.append(optim.param_groups[0]['lr'])
        optim.step()
        scheduler.step()
    assert found == [value for (value,) in rates()[:LENGTH]]


def test_a_resumed_schedule_goes_on():
    first, second = wrapper(), wrapper()
    half = TimmCosineLR(first, warmup=WARM, end=LENGTH)
    for _ in range(7):
        first.step()
        half.step()
    again = TimmCosineLR(second, warmup=WARM, end=LENGTH)
    again.load_state_dict(half.state_dict())
    for scheduler, optim in ((half, first), (again, second)):
        optim.step()
        scheduler.step()
    assert first.param_groups[0]['lr'] == second.param_groups[0]['lr']


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(end=int(1e9)), 'needs an end'),
        (dict(warmup=20), 'warmup=20, lag=1 do not fit into 20 steps'),
        (dict(lag=-1), 'both 0 or more'),
        (dict(warmup=-1), 'both 0 or more'),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        rates(**options)


def test_constant_if_all_rates_are_one():
    """Vim's fine-tuning."""
    found = rates(optim=wrapper(1e-5), warmup_lr=1e-5, eta_min=1e-5)
    assert {value for (value,) in found} == {1e-5}
