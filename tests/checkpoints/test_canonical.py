import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import warm
from fuzz_files import MODELS
from mmvssm.backbones import VSSM
from mmvssm.checkpoints import (
    CheckpointError,
    convert,
    load_checkpoint,
    save_checkpoint,
)
from mmvssm.checkpoints.read import read_state_dict

from .files import (
    V0,
    V2,
    Segmentor,
    classifier,
    published,
    randomised,
    same,
    to_v0_old,
)

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_checkpoint.py'


def test_old_names_become_current():
    state = published(classifier(V0))
    checkpoint = convert(to_v0_old(state))
    assert set(checkpoint.state_dict()) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in checkpoint.state_dict().items())
    assert checkpoint.renamed > len(state) // 2
    for part in ('VMamba classifier', 'v0-old', 'classifier.* (4)'):
        assert part in str(checkpoint)


def test_conversion_is_idempotent():
    first = convert(to_v0_old(published(classifier(V0))))
    second = convert(first.state_dict())
    assert second.renamed == 0 and second.format == 'v0-new'
    assert list(second.state_dict()) == list(first.state_dict())


def test_segmentor_keeps_the_prefix_the_runner_expects():
    state = randomised(Segmentor(V2))
    checkpoint = convert({f'module.{k}': v for k, v in state.items()})
    assert checkpoint.contents == 'segmentor'
    net = Segmentor(V2)
    net.load_state_dict(checkpoint.state_dict())
    assert same(net, state)


@pytest.mark.parametrize('name', sorted(MODELS))
def test_a_tensor_without_elements(name):
    """No parameter of a family is empty; shapes are divided by each other."""
    build, published = MODELS[name]
    net, state = build(), published(build())
    before, matched = net.state_dict(), load_checkpoint(build(), state).matched
    before = {key: value.clone() for key, value in before.items()}
    for key, value in state.items():
        for empty in (torch.empty(0), value[:0] if value.ndim else torch.empty(0, 3)):
            try:
                report = load_checkpoint(net, {**state, key: empty})
            except CheckpointError:
                assert same(net, before)
            else:
                # It is of a part that the model does not have.
                assert report.matched == matched
                net.load_state_dict(before)


def test_whole_model_with_heads_of_other_names():
    state = {
        key.replace('decode_head.', 'panoptic_head.'): value
        for key, value in randomised(Segmentor(V2)).items()
    }
    checkpoint = convert(state)
    assert checkpoint.contents == 'model'
    assert set(checkpoint.state_dict()) == set(state)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_round_trip(tmp_path, suffix):
    state = published(VSSM(V2))
    path = tmp_path / 'new' / f'weights{suffix}'
    save_checkpoint(convert(state), path)
    net = VSSM(V2)
    assert not load_checkpoint(net, path).missing
    assert same(net, state)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix == '.safetensors':
        with safe_open(path, 'pt') as file:
            assert file.metadata()['family'] == 'VMamba'


def test_shared_and_strided_tensors(tmp_path):
    state = published(VSSM(V2))
    state['outnorm0.bias'] = state['outnorm0.weight']
    key = 'layers.0.blocks.0.mlp.fc1.weight'
    state[key] = state[key].t().contiguous().t()
    path = tmp_path / 'weights.safetensors'
    save_checkpoint(convert(state), path)
    assert all(torch.equal(v, state[k]) for k, v in read_state_dict(path).items())


def test_file_is_as_readable_as_any(tmp_path):
    (tmp_path / 'any').touch()
    save_checkpoint(convert(published(VSSM(V2))), tmp_path / 'weights.pth')
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'weights.pth'
    path.write_text('old')

    def fail(content, where):
        Path(where).write_text('half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        save_checkpoint(convert(published(VSSM(V2))), path)
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match='weights.onnx'):
        save_checkpoint(convert(published(VSSM(V2))), tmp_path / 'weights.onnx')


def test_tool(tmp_path):
    state = published(classifier(V0))
    source, target = tmp_path / 'old.pth', tmp_path / 'new.safetensors'
    torch.save(dict(model=to_v0_old(state)), source)
    done = warm.run([TOOL, source, target])
    assert done.returncode == 0, done.stderr
    assert 'v0-old' in done.stdout and str(target) in done.stdout
    assert set(read_state_dict(target)) == set(state)


def test_tool_without_a_source(tmp_path, monkeypatch, capsys):
    target = tmp_path / 'new.pth'
    monkeypatch.setattr(sys, 'argv', ['tool', str(tmp_path / 'none.pth'), str(target)])
    with pytest.raises(SystemExit, match='^2$'):
        runpy.run_path(str(TOOL), run_name='__main__')
    assert capsys.readouterr().err.startswith('error: no checkpoint at ')
    assert not target.exists()
