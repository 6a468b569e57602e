"""Groups of parameters with equal settings update the weights as groups of one."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.engine.training.optimizer_groups import merge_groups
from tiny import REPO

OURS = 'mmvssm.GroupedOptimWrapperConstructor'
MMENGINE = 'DefaultOptimWrapperConstructor'
ADAMW = dict(type='AdamW', lr=0.1, weight_decay=0.5)
RULES = [
    dict(custom_keys={'norm': dict(decay_mult=0.0)}),
    dict(norm_decay_mult=0.0, bias_lr_mult=2.0, dwconv_decay_mult=0.1),
    dict(custom_keys={'0': dict(lr_mult=0.5), 'norm': dict(decay_mult=0.0)}),
    dict(flat_decay_mult=0.0),
]


def network(blocks=3):
    torch.manual_seed(0)
    parts = [
        nn.ModuleDict(dict(conv=nn.Conv2d(4, 4, 3, groups=4), norm=nn.LayerNorm(4)))
        for _ in range(blocks)
    ]
    return nn.Sequential(*parts)


def wrapper(net, constructor, rules, **optimizer):
    options = dict(ADAMW, **optimizer)
    if rules:
        return build_optim_wrapper(
            net,
            dict(constructor=constructor, optimizer=options, paramwise_cfg=rules),
        )
    return build_optim_wrapper(net, dict(constructor=constructor, optimizer=options))


def settings(net, wrapper):
    """Of each parameter, by its name."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {
        names[id(parameter)]: {k: v for k, v in group.items() if k != 'params'}
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }


class Calls(TorchDispatchMode):
    """Counts the calls of the fused kernel."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._fused_adamw_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('rules', [None, *RULES])
def test_every_parameter_keeps_its_settings(rules):
    net = network()
    ours, theirs = (wrapper(net, x, rules) for x in (OURS, MMENGINE))
    found = settings(net, ours)
    assert len(found) == 12 and found == settings(net, theirs)
    seen = [repr(x) for x in found.values()]
    assert len(ours.optimizer.param_groups) == len(set(seen))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('rules', RULES)
def test_same_bits(rules, fused):
    nets = network(), network()
    wrappers = [
        wrapper(net, x, rules, fused=fused) for net, x in zip(nets, (OURS, MMENGINE))
    ]
    start = copy.deepcopy(nets[0])
    for seed in range(3):
        for net, one in zip(nets, wrappers):
            torch.manual_seed(seed)
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            one.optimizer.step()
    for a, b, before in zip(*(n.parameters() for n in (*nets, start))):
        assert torch.equal(a, b) and not torch.equal(a, before)


def test_calls_do_not_grow_with_the_number_of_parameters():
    for blocks in (2, 9):
        net = network(blocks)
        one = wrapper(net, OURS, RULES[0], fused=True)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Calls() as calls:
            one.optimizer.step()
        assert calls.count == 2


def test_shared_parameter():
    net = network()
    net[1]['conv'].weight = net[0]['conv'].weight
    with pytest.raises(ValueError, match='bypass_duplicate=True'):
        wrapper(net, OURS, RULES[0])
    one = wrapper(net, OURS, dict(RULES[0], bypass_duplicate=True))
    assert sum(len(g['params']) for g in one.optimizer.param_groups) == 11


def test_groups_of_several_parameters():
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [dict(params=[a, b], lr=1), dict(params=[c], lr=1, betas=[0, 1])]
    merged = merge_groups([*groups, dict(lr=1, params=[])])
    assert [len(group['params']) for group in merged] == [2, 1]


def test_configs_with_rules_for_parameters_make_few_groups():
    paths = [
        path
        for path in sorted((REPO / 'configs').rglob('*.py'))
        if 'paramwise_cfg' in path.read_text()
    ]
    assert len(paths) > 10
    for path in paths:
        constructor = Config.fromfile(path).optim_wrapper.get('constructor', '')
        assert constructor.startswith('mmvssm.'), path
