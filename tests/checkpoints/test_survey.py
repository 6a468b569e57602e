"""What a pickle says of its storages and arrays is compared with the file."""

import io
import pickletools
import struct
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmvssm.checkpoints import CheckpointError, trust
from mmvssm.checkpoints.read import read_content, read_state_dict

STATE = {'w': torch.arange(6.0), 'v': torch.arange(4)}


def with_pickle(content, change):
    """The archive with another pickle, whose check sums are right."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, 'w') as new,
    ):
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith('data.pkl'):
                data = change(data)
            new.writestr(entry.filename, data)
    return buffer.getvalue()


def saved(content, legacy=False):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def refuse(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def replace(old, new):
    def change(data):
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


@pytest.mark.parametrize('trusted', [False, True])
@pytest.mark.parametrize(
    'old, new, message',
    [
        # The number of elements follows the device and its place in the memo.
        (b'cpuq\x06K\x06', b'cpuq\x06K\x07', 'should have 28 bytes, and has 24'),
        (b'cpuq\x06K\x06', b'cpuq\x06K\x05', 'should have 20 bytes, and has 24'),
        (b'cpuq\x06K\x06', b'cpuq\x06J\xff\xff\xff\xff', 'should have -4 bytes'),
        (b'FloatStorage', b'DoubleStorage', 'should have 48 bytes, and has 24'),
        (b'FloatStorage', b'OtherStorage', 'a storage of an unknown type'),
        (b'X\x01\0\0\x000', b'X\x01\0\0\x009', 'should have 24 bytes, and has 0'),
        (b'X\x07\0\0\0storage', b'X\x07\0\0\0stOrage', 'storage of the pickle'),
    ],
)
def test_a_storage_that_is_not_its_record(tmp_path, old, new, message, trusted):
    path = tmp_path / 'a.pth'
    if trusted:
        trust(path)
    refuse(path, with_pickle(saved(STATE), replace(old, new)), message)


def test_a_huge_place_in_the_memo(tmp_path):
    """Python's unpickler would fill 64 GiB."""
    change = replace(b'cpuq\x06', b'cpur\xff\xff\xff\x7f')
    content = with_pickle(saved(STATE), change)
    refuse(tmp_path / 'a.pth', content, 'the pickle is damaged')


HISTORY = HistoryBuffer(np.arange(3.0), np.ones(3, dtype='int64'))
TRAINED = dict(state_dict=STATE, message_hub=dict(loss=HISTORY, lr=np.float64(0.1)))


def spoil_dtype(field):
    """Change a number of the state of the first dtype: its alignment or its flags."""

    def change(data):
        ops = list(pickletools.genops(data))
        at = next(i for i, (_, arg, _) in enumerate(ops) if arg == 'numpy dtype')
        # The state is (3, '<', None, None, None, -1, -1, 0).
        build = next(i for i in range(at, len(ops)) if ops[i][0].name == 'TUPLE')
        numbers = [op for op in ops[at:build] if op[0].name in ('BININT', 'BININT1')]
        op, value, position = numbers[field]
        size = 1 if op.name == 'BININT1' else 4
        new = struct.pack('<i', 1)[:size]
        return data[: position + 1] + new + data[position + 1 + size :]

    return change


@pytest.mark.parametrize('field', [-1, -2, -3, -4], ids=str)
@pytest.mark.parametrize('legacy', [False, True])
def test_the_state_of_a_numpy_dtype(tmp_path, field, legacy, capfd):
    content = saved(TRAINED, legacy)
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    assert read_content(path)['message_hub']['lr'] == 0.1
    if legacy:
        # The content is the fourth pickle.
        file, start = io.BytesIO(content), 0
        for _ in range(3):
            list(pickletools.genops(file))
        start = file.tell()
        content = content[:start] + spoil_dtype(field)(content[start:])
    else:
        content = with_pickle(content, spoil_dtype(field))
    refuse(path, content, 'a numpy dtype is damaged')
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('legacy', [False, True])
def test_arrays_of_objects(tmp_path, legacy):
    """In a trusted file they are allowed."""
    path = tmp_path / 'a.pth'
    content = saved(dict(STATE, names=np.array(['a', None], dtype=object)), legacy)
    refuse(path, content, 'array of object is not a plain array')
    trust(path)
    assert list(read_content(path)['names']) == ['a', None]
