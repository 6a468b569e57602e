"""Files of checkpoints: whole or not at all, and which one comes first."""

import os

import pytest
import torch

from mmvssm.checkpoints import CheckpointError
from mmvssm.engine.checkpoints import files


def save(path, age, keys=('meta', 'state_dict', 'message_hub', 'optimizer')):
    content = dict(
        meta=dict(epoch=0, iter=7),
        state_dict=dict(weight=torch.ones(50)),
        message_hub={},
        optimizer={},
    )
    torch.save({key: content[key] for key in keys}, path)
    os.utime(path, (1000 - age, 1000 - age))


def newest(folder):
    said = []
    path = files.newest_training_state(folder, said.append)
    return path and os.path.basename(path), said


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'file'
    files.write_whole(path, b'old')
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError('full')))
    with pytest.raises(OSError, match='full'):
        files.write_whole(path, b'new')
    assert path.read_bytes() == b'old'
    assert os.listdir(path.parent) == ['file']


def test_backend_notes_what_it_cannot_write(tmp_path):
    (tmp_path / 'folder').mkdir()
    files.WholeFileBackend().put(b'', tmp_path / 'folder')
    assert str(tmp_path / 'folder') in files.WholeFileBackend.failures.pop()


def test_pointer_comes_first_unless_a_later_save_never_moved_it(tmp_path):
    assert newest(tmp_path) == (None, [])
    save(tmp_path / 'iter_10.pth', age=3)
    save(tmp_path / 'iter_20.pth', age=2)
    # Of an earlier training in the same folder.
    save(tmp_path / 'iter_900.pth', age=9)
    save(tmp_path / 'best_mIoU_iter_950.pth', age=0)
    assert newest(tmp_path)[0] == 'iter_20.pth'
    # The folder was moved since.
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/iter_10.pth')
    assert newest(tmp_path)[0] == 'iter_20.pth'
    os.utime(tmp_path / 'iter_20.pth', (1, 1))
    assert newest(tmp_path)[0] == 'iter_10.pth'


def test_checkpoints_within_epochs_are_of_a_later_time(tmp_path):
    save(tmp_path / 'epoch_9.pth', age=3)
    (tmp_path / 'last_checkpoint').write_text('epoch_9.pth')
    save(tmp_path / 'epoch_9_iter_1000.pth', age=2)
    assert newest(tmp_path)[0] == 'epoch_9_iter_1000.pth'
    (tmp_path / 'last_checkpoint').write_text('epoch_9_iter_1000.pth')
    save(tmp_path / 'epoch_10.pth', age=1)
    assert newest(tmp_path)[0] == 'epoch_10.pth'


def test_what_cannot_be_read_is_named_and_passed_over(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path / f'iter_{step}.pth', age=100 - step)
    (tmp_path / 'iter_40.pth').write_bytes(b'')
    save(tmp_path / 'iter_30.pth', 70, ('state_dict',))
    flipped = bytearray((tmp_path / 'iter_20.pth').read_bytes())
    # One bit of the fifty ones.
    flipped[flipped.index(b'\x80\x3f' * 1, flipped.index(b'\0\0\x80\x3f' * 9))] ^= 1
    (tmp_path / 'iter_20.pth').write_bytes(flipped)
    os.utime(tmp_path / 'iter_20.pth', (920, 920))
    os.utime(tmp_path / 'iter_40.pth', (999, 999))
    found, said = newest(tmp_path)
    assert found == 'iter_10.pth'
    assert [os.path.basename(text.split()[0]) for text in said] == [
        'iter_40.pth',
        'iter_30.pth',
        'iter_20.pth',
    ]
    assert 'truncated' in said[0] and 'meta' in said[1] and 'check sum' in said[2]
    (tmp_path / 'iter_10.pth').unlink()
    with pytest.raises(CheckpointError, match='none of the 3 checkpoints'):
        newest(tmp_path)


@pytest.mark.parametrize('part', ['meta', 'state_dict', 'message_hub', 'optimizer'])
def test_parts_of_a_wrong_kind_are_no_state_of_a_training(tmp_path, part):
    save(tmp_path / 'iter_7.pth', age=0)
    content = torch.load(tmp_path / 'iter_7.pth')
    content[part] = torch.ones(2)
    torch.save(content, tmp_path / 'iter_7.pth')
    with pytest.raises(CheckpointError, match='no training as mmengine saves it'):
        files.check_training_state(tmp_path / 'iter_7.pth')
