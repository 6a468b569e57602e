import pytest
import torch

from mmvssm import ops
from mmvssm.ops import backends


def test_choice_follows_the_tensors():
    assert ops.choose_backend('cpu', torch.float32) == 'torch'
    assert ops.choose_backend('cuda', torch.bfloat16) == 'torch'


def test_reference_is_never_chosen_silently(monkeypatch):
    monkeypatch.delitem(backends._BACKENDS, 'torch')
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
    with pytest.raises(RuntimeError, match='inside'), ops.use_backend('reference'):
        raise RuntimeError('inside')
    assert ops.choose_backend('cpu', torch.float32) == 'torch'


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match='unknown scan backend'):
        ops.use_backend('fast').__enter__()
    monkeypatch.setenv('MMVSSM_SCAN_BACKEND', 'fast')
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        ops.choose_backend('cpu', torch.float32)


def test_status_and_reasons(monkeypatch):
    assert ops.backend_status() == {'torch': None, 'reference': None}
    broken = backends.Backend('broken', 'test', unavailable=lambda: 'no such chip')
    monkeypatch.setitem(backends._BACKENDS, 'broken', broken)
    assert ops.backend_status()['broken'] == 'no such chip'
    with pytest.raises(ops.BackendUnavailableError, match='no such chip'):
        ops.choose_backend('cpu', torch.float32, 'broken')
    with pytest.raises(ops.BackendUnavailableError, match='not int64'):
        ops.choose_backend('cpu', torch.int64, 'torch')
