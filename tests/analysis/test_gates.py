"""Gates of mixers, against plain loops."""

import math

import pytest
import torch

from families import FAMILIES
from mmvssm.analysis.gates import (
    decay,
    forget_gates,
    input_gates,
    without_normalisation,
)
from mmvssm.analysis.routes import record_mixings
from mmvssm.backbones import VSSM, MambaR
from mmvssm.backbones.linear_attention_study import LinearAttentionStudy

IMAGE = (1, 3, 12, 20)


def record(net):
    torch.manual_seed(1)
    (mixing,) = record_mixings(net, torch.randn(IMAGE, dtype=torch.float64))
    return mixing


def ss2d(orders='cross', states=3):
    torch.manual_seed(0)
    arch = dict(depths=(1,), dims=4, ssm_d_state=states)
    return VSSM(arch, out_indices=(0,), orders=orders).double()


def study(**options):
    torch.manual_seed(0)
    arch = dict(depths=(1,), dims=8, head_dim=4)
    return LinearAttentionStudy(arch, out_indices=(0,), **options).double()


def mambar():
    torch.manual_seed(0)
    arch = dict(embed_dims=8, depth=1, patch_size=4, stride=4, registers=3, d_state=2)
    return MambaR(arch, img_size=(12, 20)).double()


@pytest.mark.parametrize('make', [lambda: ss2d('windows2'), mambar])
def test_gates_by_loops(make):
    mixing = record(make())
    maps, gates = input_gates(mixing), forget_gates(mixing)
    rows, columns = mixing.size
    assert (rows, columns) == (3, 5)
    for name, route in mixing.routes.items():
        dt, A, places = route.dt.tolist(), route.A.tolist(), route.places.tolist()
        for number, place in enumerate(mixing.patches.tolist()):
            at = places.index(place)
            want = sum(line[at] for line in dt) / len(dt)
            got = maps[name][number // columns, number % columns]
            assert got.item() == pytest.approx(want, rel=1e-12)
        values = [
            math.exp(step * rate)
            for line, rates in zip(dt, A)
            for step, place in zip(line, places)
            for rate in rates
            if place >= 0
        ]
        want = sum(values) / len(values)
        assert gates[name] == pytest.approx(want, rel=1e-12)
    names = list(mixing.routes)
    mean = sum(maps[name] for name in names) / len(names)
    torch.testing.assert_close(maps['merged'], mean)
    mean = sum(gates[name] for name in names) / len(names)
    assert gates['merged'] == pytest.approx(mean, rel=1e-12)


def test_decay_by_loops():
    mixing = record(ss2d())
    got = decay(mixing, [0, 1, 7])
    for k, found in zip((0, 1, 7), got, strict=True):
        values = []
        for route in mixing.routes.values():
            dt, A = route.dt.tolist(), route.A.tolist()
            for line, rates in zip(dt, A):
                for t in range(len(line) - k):
                    for rate in rates:
                        values.append(math.exp(rate * sum(line[t + 1 : t + 1 + k])))
        assert found == pytest.approx(sum(values) / len(values), rel=1e-10)
    assert got[0] == 1
    with pytest.raises(ValueError, match='distances must be 0 to 14'):
        decay(mixing, [15])


def test_what_a_layer_does_not_have():
    mixing = record(study())
    assert not input_gates(mixing) and not forget_gates(mixing)
    assert decay(mixing, [1]) == []
    mixing = record(study(input_gate=True))
    assert set(input_gates(mixing)) == {'attention', 'merged'}
    assert not forget_gates(mixing)
    mixing = record(study(forget_gate=True))
    assert set(forget_gates(mixing)) == {'forward', 'merged'}
    assert not input_gates(mixing)
    mixing = record(study(forget_gate=True, input_gate=True))
    assert set(input_gates(mixing)) == {'forward', 'merged'}


def test_without_normalisation():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    net = FAMILIES['mlla']().eval()
    with torch.no_grad():
        before = net(image)[-1]
        with without_normalisation(net) as changed:
            assert changed
            assert not torch.allclose(net(image)[-1], before)
        torch.testing.assert_close(net(image)[-1], before, rtol=0, atol=0)
    with without_normalisation(FAMILIES['vim']()) as changed:
        assert not changed
