import argparse
import os
import sys
import types

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from mmvssm.backbones import VSSM
from mmvssm.checkpoints import CheckpointError
from mmvssm.checkpoints import read as module
from mmvssm.checkpoints.read import read_state_dict, read_weights

STATE = {'layers.0.weight': torch.arange(6.0).reshape(2, 3)}


def check(state):
    assert list(state) == list(STATE)
    assert torch.equal(state['layers.0.weight'], STATE['layers.0.weight'])


@pytest.fixture
def foreign_class():
    """A dict class of a module that the reader cannot import, as yacs's."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        yield module.CfgNode


@pytest.mark.parametrize('legacy', [False, True])
def test_foreign_objects_beside_the_weights(tmp_path, foreign_class, legacy):
    node = foreign_class(LR=0.1, MODEL=foreign_class(NAME='vssm'))
    node.frozen = True
    path = tmp_path / 'published.pth'
    torch.save(
        dict(
            model=STATE,
            args=argparse.Namespace(lr=0.1, model='vssm'),
            config=node,
            max_accuracy=np.float64(82.6),
            scores=np.arange(3),
        ),
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    del sys.modules['yacs.config'], sys.modules['yacs']
    check(read_state_dict(path))


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path, function):
        self.call = function, (str(path),)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('function', [os.mkdir, exec, print], ids=lambda f: f.__name__)
def test_code_in_a_file_does_not_run(tmp_path, function, capsys):
    trace = tmp_path / 'trace'
    argument = trace if function is not exec else f'import os; os.mkdir({str(trace)!r})'
    path = tmp_path / 'evil.pth'
    torch.save(dict(model=STATE, extra=Evil(argument, function)), path)
    with pytest.raises(CheckpointError, match='is refused: reading it would call'):
        read_state_dict(path)
    assert not trace.exists() and capsys.readouterr().out == ''


def test_after_a_loader_that_takes_back_what_is_allowed(tmp_path):
    """mmengine's does: a file read before and after gives the same."""
    path = tmp_path / 'epoch_1.pth'
    history = HistoryBuffer(np.arange(3.0), np.ones(3, dtype='int64'))
    torch.save(dict(state_dict=STATE, message_hub=dict(history=history)), path)
    check(read_state_dict(path))
    torch.serialization.clear_safe_globals()
    check(read_state_dict(path))


def test_safetensors(tmp_path):
    path = tmp_path / 'weights.safetensors'
    save_file(STATE, path)
    check(read_state_dict(path))


def test_nesting_and_mappings():
    check(read_state_dict(STATE))
    check(read_state_dict({'state_dict': {'model': STATE}, 'iter': 3}))
    # Training and averaged weights: the former.
    check(read_state_dict({'model_ema': {'x': torch.zeros(1)}, 'model': STATE}))


@pytest.mark.parametrize(
    'content',
    [dict(epoch=3, optimizer=dict(lr=0.1)), {}, [1, 2], torch.zeros(3), dict(model={})],
    ids=str,
)
def test_no_state_dict(tmp_path, content):
    path = tmp_path / 'odd.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match='odd.pth holds no state dict'):
        read_state_dict(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint at .*none.pth') as error:
        read_state_dict(tmp_path / 'none.pth')
    assert isinstance(error.value, FileNotFoundError)


def test_address_of_another_package():
    """Base configs of mmseg have one, for the backbone that they have."""
    net = VSSM(dict(depths=(1,), dims=8), out_indices=(0,), pretrained='open-mmlab://r')
    with pytest.raises(CheckpointError, match='open-mmlab://r, .* set pretrained=None'):
        net.init_weights()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('keep', [0.0, 0.3, 0.9])
def test_truncated_file(tmp_path, suffix, keep):
    path = tmp_path / f'weights{suffix}'
    state = {'w': torch.randn(100, 100)}
    torch.save(state, path) if suffix == '.pth' else save_file(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match=f'weights{suffix} .* truncated or not a'):
        read_state_dict(path)


@pytest.mark.parametrize(
    'data',
    [
        b'<!DOCTYPE html><html>404</html>',
        b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n',
        bytes(range(256)) * 9,
    ],
    ids=['html', 'lfs', 'bytes'],
)
def test_not_a_checkpoint(tmp_path, data):
    path = tmp_path / 'weights.pth'
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match='not a checkpoint'):
        read_state_dict(path)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_the_reason_is_not_torchs_advice(tmp_path):
    """torch cannot read this protocol; its advice is to run the code in the file."""
    path = tmp_path / 'a.pth'
    torch.save(STATE, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match='Unsupported operand') as error:
        read_state_dict(path)
    assert 'weights_only' not in str(error.value)


def test_folder(tmp_path):
    with pytest.raises(CheckpointError, match='not a checkpoint'):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    'source', ['https://example.org/a.pth?dl=1', 'mmvssm://vim_t', 'hf://me/mine/a.pth']
)
def test_address(tmp_path, monkeypatch, source):
    torch.save(STATE, tmp_path / 'a.pth')
    asked = []

    def fetch(address):
        asked.append(address)
        return tmp_path / 'a.pth'

    monkeypatch.setattr(module.zoo, 'fetch', fetch)
    check(read_state_dict(source))
    assert asked == [source]


# ------------------------------------------------- raw and averaged weights
RAW, EMA = {'w': torch.zeros(2)}, {'w': torch.ones(2)}


@pytest.mark.parametrize(
    'content, raw, ema',
    [
        (dict(model=RAW, model_ema=EMA), 'model', 'model_ema'),
        (dict(model=RAW, state_dict_ema=EMA), 'model', 'state_dict_ema'),
        (dict(state_dict=RAW, model_ema=EMA), 'state_dict', 'model_ema'),
        # mmengine's hook has them the other way round.
        (dict(state_dict=EMA, ema_state_dict=RAW), 'ema_state_dict', 'state_dict'),
        (dict(state_dict=dict(model=RAW, model_ema=EMA)), 'model', 'model_ema'),
    ],
)
def test_copies(content, raw, ema):
    for copy, key, want in (('raw', raw, RAW), ('ema', ema, EMA)):
        found = read_weights(content, copy)
        assert torch.equal(found.tensors['w'], want['w'])
        assert found.copy == key and found.others == ({raw: ema, ema: raw}[key],)
    default = read_weights(content).copy
    assert default in ('model', 'state_dict')


@pytest.mark.parametrize(
    'content, copy, message',
    [
        (dict(model=RAW), 'ema', r"no averaged .EMA. weights, but \['model'\]"),
        (RAW, 'ema', 'no averaged .EMA. weights, but one copy alone'),
        (dict(model_ema=EMA), 'raw', r"no raw weights, but \['model_ema'\]"),
    ],
)
def test_a_copy_that_is_not_there(content, copy, message):
    with pytest.raises(CheckpointError, match=message):
        read_weights(content, copy)


def test_a_copy_of_no_known_kind():
    with pytest.raises(ValueError, match='weights must be one of'):
        read_weights(RAW, 'EMA')


@pytest.mark.parametrize(
    'name, content, copy, note',
    [
        ('vim_b', dict(model=RAW, model_ema=EMA), 'model_ema', None),
        ('vim_t', dict(model_ema=EMA, model=RAW), 'model', None),
        ('vmamba_t_v0', dict(model=RAW, model_ema=EMA), 'model', None),
        ('mlla_t', dict(model=RAW, state_dict_ema=EMA), 'model', 'is not known'),
        ('mlla_t', dict(model=RAW), 'model', None),
        ('vim_b', dict(model=RAW), 'model', 'belong to model_ema, which the file does'),
    ],
)
def test_the_copy_that_the_published_figure_belongs_to(
    tmp_path, monkeypatch, name, content, copy, note
):
    torch.save(content, tmp_path / 'a.pth')
    monkeypatch.setattr(module.zoo, 'fetch', lambda source: tmp_path / 'a.pth')
    found = read_weights(f'mmvssm://{name}')
    assert found.copy == copy
    assert note in found.notes[0] if note else not found.notes
