import dataclasses

import pytest
import torch

from mmvssm import ops
from mmvssm.ops import backends

from .bidirectional_inputs import call as call_bidirectional
from .bidirectional_inputs import make_inputs
from .scan_inputs import scan_inputs, ss2d_inputs


@pytest.fixture(autouse=True)
def emulated_gpu():
    """There is none here: the choice is that of a machine without a GPU."""


def without_kernels(monkeypatch, reason='not compiled', name='cpu'):
    broken = dataclasses.replace(backends.suppliers[name], unavailable=lambda: reason)
    monkeypatch.setitem(backends.suppliers, name, broken)


@pytest.mark.parametrize('compiled', [True, False])
def test_choice_follows_the_tensors(monkeypatch, compiled):
    reason = None if compiled else 'not compiled'
    without_kernels(monkeypatch, reason)
    best = 'cpu' if compiled else 'torch'
    assert ops.choose_backend('cpu', torch.float32) == best
    assert ops.choose_backend('cpu', torch.bfloat16) == best
    for dtype in (torch.float16, torch.float64):
        assert ops.choose_backend('cpu', dtype) == 'torch'
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert ops.choose_backend('cuda', dtype) == 'torch'


def test_reference_is_never_chosen_silently(monkeypatch):
    only = {'reference': backends.suppliers['reference']}
    monkeypatch.setattr(backends, 'suppliers', only)
    with pytest.raises(ops.BackendUnavailableError, match='no scan backend takes'):
        ops.choose_backend('cpu', torch.float32)


def test_order_of_overrides(monkeypatch):
    monkeypatch.setenv('MMVSSM_SCAN_BACKEND', 'reference')
    assert ops.choose_backend('cpu', torch.float32) == 'reference'
    with ops.use_backend('torch'):
        assert ops.choose_backend('cpu', torch.float32) == 'torch'
        with ops.use_backend('reference'):
            assert ops.choose_backend('cpu', torch.float32) == 'reference'
            assert ops.choose_backend('cpu', torch.float32, 'torch') == 'torch'
    assert ops.choose_backend('cpu', torch.float32) == 'reference'


def test_use_backend_ends_with_an_error_inside():
    before = ops.choose_backend('cpu', torch.float32)
    with pytest.raises(RuntimeError, match='inside'), ops.use_backend('reference'):
        raise RuntimeError('inside')
    assert ops.choose_backend('cpu', torch.float32) == before


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match='unknown scan backend'):
        ops.use_backend('fast').__enter__()
    monkeypatch.setenv('MMVSSM_SCAN_BACKEND', 'fast')
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        ops.choose_backend('cpu', torch.float32)


def test_status_and_reasons(monkeypatch):
    without_kernels(monkeypatch)
    without_kernels(monkeypatch, 'no compiler', name='cuda')
    without_kernels(monkeypatch, 'not installed', name='mamba_ssm')
    assert ops.backend_status() == {
        'cpu': 'not compiled',
        'cuda': 'no compiler',
        'mamba_ssm': 'not installed',
        'torch': None,
        'reference': None,
    }
    with pytest.raises(
        ops.BackendUnavailableError,
        match=r"'cpu' cannot run: not compiled\. .* one of \['torch', 'reference'\]",
    ):
        ops.choose_backend('cpu', torch.float32, 'cpu')
    broken = backends.Supplier('broken', 'test', unavailable=lambda: 'no such chip')
    monkeypatch.setitem(backends.suppliers, 'broken', broken)
    assert ops.backend_status()['broken'] == 'no such chip'
    with pytest.raises(ops.BackendUnavailableError, match='no such chip'):
        ops.choose_backend('cpu', torch.float32, 'broken')
    with pytest.raises(ops.BackendUnavailableError, match='not int64'):
        ops.choose_backend('cpu', torch.int64, 'torch')
    with pytest.raises(ops.BackendUnavailableError, match='not float64'):
        ops.choose_backend('cpu', torch.float64, 'cpu')
    with pytest.raises(ops.BackendUnavailableError, match='cpu tensors, not cuda'):
        ops.choose_backend('cuda', torch.float32, 'cpu')
    with pytest.raises(ops.BackendUnavailableError, match='cuda tensors, not cpu'):
        ops.choose_backend('cpu', torch.float32, 'cuda')


def test_states_of_a_call(monkeypatch):
    few = dataclasses.replace(backends.suppliers['cpu'], states=(1, 8, 16))
    monkeypatch.setitem(backends.suppliers, 'cpu', few)
    monkeypatch.setitem(
        backends.suppliers,
        'cuda',
        dataclasses.replace(
            backends.suppliers['cuda'], devices=None, unavailable=lambda: None
        ),
    )
    without_kernels(monkeypatch, None)
    assert ops.choose_backend('cpu', torch.float32) == 'cpu'
    assert ops.choose_backend('cpu', torch.float32, states=16) == 'cpu'
    assert ops.choose_backend('cpu', torch.float32, states=4) == 'torch'
    with pytest.raises(ops.BackendUnavailableError, match='takes 1/8/16 states, not 4'):
        ops.choose_backend('cpu', torch.float32, 'cpu', states=4)
    assert ops.choose_backend('cpu', torch.float32, 'cuda', states=256) == 'cuda'
    with pytest.raises(ops.BackendUnavailableError, match='1 to 256 states, not 257'):
        ops.choose_backend('cpu', torch.float32, 'cuda', states=257)


@pytest.mark.parametrize('op', ['selective_scan', 'ss2d_scan', 'bidirectional_scan'])
def test_ops_tell_their_states(monkeypatch, op):
    none = dataclasses.replace(backends.suppliers['torch'], states=())
    monkeypatch.setitem(backends.suppliers, 'torch', none)
    calls = {
        'selective_scan': lambda: ops.selective_scan(**scan_inputs(1, 2, 3, 5)),
        'ss2d_scan': lambda: ops.ss2d_scan(**ss2d_inputs(1, 2, 3, 2, 1, 5)),
        'bidirectional_scan': lambda: call_bidirectional(make_inputs(1, 2, 3, 1, 5, 4)),
    }
    with (
        ops.use_backend('torch'),
        pytest.raises(ops.BackendUnavailableError, match='states, not 5'),
    ):
        calls[op]()


def test_explanation(monkeypatch):
    without_kernels(monkeypatch, None)
    without_kernels(monkeypatch, 'not installed', name='mamba_ssm')
    assert ops.explain_backend('cpu', torch.float32, states=16) == {
        'cpu': 'chosen: the first usable backend in this list',
        'cuda': 'cannot run: it takes cuda tensors, not cpu',
        'mamba_ssm': 'cannot run: it takes cuda tensors, not cpu',
        'torch': 'not needed: cpu is used',
        'reference': 'used only when named',
    }
    assert list(ops.explain_backend('cpu', torch.float32)) == ops.list_backends()
    found = ops.explain_backend('cuda', torch.float32, states=257)
    assert found['torch'].startswith('chosen')
    assert found['cuda'] == 'cannot run: it takes 1 to 256 states, not 257'
    torch.use_deterministic_algorithms(True)
    found = ops.explain_backend('cuda', torch.float32, states=16)
    assert 'torch.use_deterministic_algorithms' in found['mamba_ssm']
    torch.use_deterministic_algorithms(False)
    assert ops.explain_backend('cuda', torch.float32)['mamba_ssm'].endswith('installed')
    monkeypatch.setenv('MMVSSM_SCAN_BACKEND', 'torch')
    found = ops.explain_backend('cpu', torch.float32)
    assert found['torch'] == 'chosen: named by MMVSSM_SCAN_BACKEND'
    assert found['cpu'] == 'not needed: torch is used'
    with ops.use_backend('reference'):
        found = ops.explain_backend('cpu', torch.float32)
        assert found['reference'] == 'chosen: named by use_backend'
        found = ops.explain_backend('cpu', torch.float32, 'cpu')
        assert found['cpu'] == 'chosen: named by backend='
    with pytest.raises(ops.BackendUnavailableError, match='not cpu'):
        ops.explain_backend('cpu', torch.float32, 'cuda')
