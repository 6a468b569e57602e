"""Mixers between linear attention and Mamba, as `configs/ablation` has them."""

import pytest

from studies import analyze, results_of
from tiny import REPO

pytest.importorskip('mmseg')
MODELS = [
    REPO / 'configs/ablation' / f'{name}.py'
    for name in ('baseline', 'input_gate', 'forget_gate', 'mamba')
]
COMMON = ['--models', *MODELS, '--size', 32, 48, '--num-images', 1]
# The heads do not run.
COMMON += ['--cfg-options', 'model.backbone.arch=small', '--out-dir']


def test_attention(tmp_path, monkeypatch):
    more = ['--modes', 'decayed', '--no-matrices', '--no-rollout']
    assert analyze(monkeypatch, 'attention', *COMMON, tmp_path, *more) == 0
    found = results_of(tmp_path, 'attention')['results']
    assert list(found) == ['baseline', 'input_gate', 'forget_gate', 'mamba']
    for result in found.values():
        assert list(result['attention']['decayed']) == ['merged']


def test_gates(tmp_path, monkeypatch):
    assert analyze(monkeypatch, 'gates', *COMMON, tmp_path) == 0
    found = results_of(tmp_path, 'gates')['results']
    has = {
        label: [
            result[key] is not None
            for key in ('input_gate', 'forget_gate', 'token_length_unnormalised')
        ]
        for label, result in found.items()
    }
    assert has == dict(
        baseline=[False, False, True],
        input_gate=[True, False, True],
        forget_gate=[False, True, True],
        mamba=[True, True, False],
    )
