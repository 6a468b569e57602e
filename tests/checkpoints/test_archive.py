"""What reaches torch's reader of archives is what the file says."""

import io
import random
import struct
import zipfile

import pytest
import torch

from fuzz_headers import find_headers, repack, set_field, spoil_headers
from mmvssm.checkpoints import CheckpointError, trust
from mmvssm.checkpoints.archive import check_archive
from mmvssm.checkpoints.read import read_content, read_state_dict
from mmvssm.checkpoints.unpickle import unpickle

STATE = {
    'a.weight': torch.arange(6.0).reshape(2, 3) + 0.25,
    'b.weight': torch.arange(6.0).reshape(2, 3) - 7.5,
    'count': torch.tensor(3),
    'empty': torch.empty(0),
}
OWN_NAME = struct.pack('<2HBI', 0x7075, 8, 1, 0) + b'abc'
# The times of a file, as zip programs of Unix add them.
TIMES = struct.pack('<2HBI', 0x5455, 5, 1, 12345)


def saved(state=STATE):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def same(state):
    return list(state) == list(STATE) and all(
        torch.equal(state[key], value) and state[key].dtype == value.dtype
        for key, value in STATE.items()
    )


def refuse(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


def taken(path, content):
    """Whether the file is taken; what is taken must be what was written."""
    path.write_bytes(content)
    try:
        state = read_state_dict(path)
    except CheckpointError:
        return False
    assert same(state)
    return True


# ------------------------------------------------------------ what must be read
def test_a_file_with_any_name(tmp_path):
    for name in ('a.pth', 'модель.pth', 'a b.c.pth', 'x' * 200 + '.pth', 'a'):
        torch.save(STATE, tmp_path / name)
        assert same(read_state_dict(tmp_path / name))


def test_torchs_older_format(tmp_path):
    torch.save(STATE, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    assert same(read_state_dict(tmp_path / 'a.pth'))


def test_shared_and_special_storages(tmp_path):
    whole = torch.arange(12.0)
    state = dict(
        a=whole[:6],
        b=whole[6:],
        half=torch.ones(3).half(),
        small=torch.ones(3).to(torch.float8_e4m3fn),
        flag=torch.ones(2) > 0,
        complex=torch.ones(2, dtype=torch.complex64),
        parameter=torch.nn.Parameter(torch.ones(2)),
        sparse=torch.eye(3).to_sparse(),
    )
    torch.save(state, tmp_path / 'a.pth')
    found = read_content(tmp_path / 'a.pth')
    assert torch.equal(found['b'], whole[6:]) and list(found) == list(state)
    assert torch.equal(found['sparse'].to_dense(), torch.eye(3))


@pytest.mark.parametrize('how', ['plain', 'streamed', 'zip64'])
@pytest.mark.parametrize('extra', [b'', TIMES], ids=['bare', 'times'])
def test_repacked_without_compression(tmp_path, how, extra):
    assert taken(tmp_path / 'a.pth', repack(saved(), how, extra))


def test_sizes_in_the_field_for_large_ones(tmp_path, monkeypatch):
    """As in a file of more than 4 GiB; zipfile writes them above its limit."""
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 10)
    content = repack(saved(), 'zip64')
    monkeypatch.undo()
    header = find_headers(content)['central'][0]
    assert content[header + 20 : header + 28] == b'\xff' * 8
    assert taken(tmp_path / 'a.pth', content)
    position = header + 46 + struct.unpack_from('<H', content, header + 28)[0] + 4
    spoilt = bytearray(content)
    spoilt[position] ^= 1
    refuse(tmp_path / 'a.pth', bytes(spoilt), 'truncated or not .*data.pkl')


def test_folders_have_records_of_their_own(tmp_path):
    """As ``zip -0 -r`` writes them."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved())) as old,
        zipfile.ZipFile(buffer, 'w') as new,
    ):
        for folder in ('archive/', 'archive/data/'):
            info = zipfile.ZipInfo(folder)
            info.external_attr = 0o40755 << 16 | 0x10
            new.writestr(info, b'')
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert taken(tmp_path / 'a.pth', buffer.getvalue())


# ------------------------------------------------------------- what is refused
@pytest.mark.filterwarnings('ignore:invalid escape sequence')
@pytest.mark.parametrize('how', ['torch', 'plain', 'streamed', 'zip64'])
def test_a_flipped_bit_anywhere(tmp_path, how):
    path = tmp_path / 'a.pth'
    content = saved() if how == 'torch' else repack(saved(), how)
    ends = []
    for position in range(len(content)):
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << position % 8
        path.write_bytes(spoilt)
        # Reading is slow; most are refused before.
        try:
            check_archive(path)
        except (CheckpointError, ValueError):
            continue
        ends.append(taken(path, bytes(spoilt)))
    # Such as a version that no program looks at, and what fills a place.
    assert 0 < sum(ends) < len(content) / 3


@pytest.mark.parametrize('how', ['torch', 'plain', 'streamed'])
def test_a_record_marked_as_a_folder(tmp_path, how):
    """torch returns unset memory for it."""
    content = saved() if how == 'torch' else repack(saved(), how)
    for header in find_headers(content)['central']:
        spoilt = bytearray(content)
        spoilt[header + 38] |= 0x10
        refuse(tmp_path / 'a.pth', bytes(spoilt), 'attributes 0x.*not those of a file')


def flip(bit):
    return lambda value: value ^ bit


# The form of the archive, the fields (kind of header, number) and what becomes of them.
@pytest.mark.parametrize(
    'how, fields, change, message',
    [
        ('plain', ['central 3', 'local 2'], flip(1), 'flags 0x1'),
        ('plain', ['central 3', 'local 2'], flip(0x40), 'flags 0x40'),
        ('plain', ['central 3'], flip(8), 'flags, method or time differ'),
        ('plain', ['central 4', 'local 3'], flip(8), 'compression method 8'),
        ('plain', ['central 4', 'local 3'], flip(12), 'compression method 12'),
        ('plain', ['local 3'], flip(8), 'flags, method or time differ'),
        ('torch', ['local 4'], flip(1), 'flags, method or time differ'),
        ('plain', ['central 8'], flip(1), 'compression method 0, or two sizes'),
        ('plain', ['central 8', 'central 9'], flip(1), 'size differ in its two'),
        ('torch', ['central 8', 'central 9'], flip(1), 'what follows it is not'),
        ('torch', ['central 8', 'central 9'], flip(2**24), 'larger than its place'),
        ('plain', ['local 6'], flip(1), 'check sum or size differ'),
        ('torch', ['local 6'], flip(1), 'check sum or size differ'),
        ('plain', ['local 7'], flip(1), 'check sum or size differ'),
        ('plain', ['local 8'], flip(1), 'check sum or size differ'),
        ('zip64', ['local 8'], flip(1), 'check sum or size differ'),
        ('torch', ['central 0'], flip(1), 'its directory is damaged'),
        ('torch', ['central 10'], flip(2**14), 'its directory is cut off'),
        ('torch', ['central 13'], flip(1), 'a comment, several parts'),
        ('torch', ['central 14'], flip(2), 'a comment, several parts'),
        ('torch', ['central 15'], flip(0x10), 'not those of a file'),
        ('plain', ['central 15'], lambda _: 0o120644 << 16, 'not those of a file'),
        ('torch', ['central 16'], lambda _: 5, 'it is larger than its place'),
        ('torch', ['local 0'], flip(1), 'another record is where it should be'),
        ('torch', ['local 10'], flip(1), 'extra fields are damaged'),
        ('torch', ['descriptor 0'], flip(1), 'what follows it is not'),
        ('torch', ['descriptor 1'], flip(1), 'what follows it is not'),
        ('torch', ['descriptor 3'], flip(1), 'what follows it is not'),
        ('plain', ['end 0'], flip(1), 'does not end with an end record'),
        ('plain', ['end 7'], flip(1), 'does not end with an end record'),
        ('plain', ['end 1'], flip(1), 'archive in several parts'),
        ('plain', ['end 3'], flip(1), 'archive in several parts'),
        ('plain', ['end 3', 'end 4'], lambda n: n + 1, 'records are declared'),
        ('plain', ['end 5'], flip(1), 'does not end where the end record starts'),
        ('torch', ['end 4', 'end 3'], flip(1), 'its two end records do not agree'),
        ('torch', ['end64 0'], flip(1), 'its two end records do not agree'),
        ('torch', ['end64 1'], flip(1), 'its two end records do not agree'),
        ('torch', ['end64 9', 'end 6'], flip(1), 'does not end where the end record'),
        ('torch', ['locator 0'], flip(1), 'does not end where the end record starts'),
        ('torch', ['locator 2'], flip(1), 'its locator of the end record is wrong'),
    ],
)
def test_a_header_field(tmp_path, how, fields, change, message):
    content = bytearray(saved() if how == 'torch' else repack(saved(), how))
    found = find_headers(content)
    for field in fields:
        kind, number = field.split()
        place = found[kind][min(5, len(found[kind]) - 1)]
        set_field(content, place, kind, int(number), change)
    refuse(tmp_path / 'a.pth', bytes(content), f'truncated or not .*{message}')


@pytest.mark.parametrize(
    'which, message', [(0, 'does not start where the one'), (3, 'what follows it')]
)
def test_a_record_that_is_not_in_the_directory(tmp_path, which, message):
    content = bytearray(repack(saved()))
    found = find_headers(content)
    start, stop = found['central'][which : which + 2]
    end = found['end'][0]
    for field in (3, 4):
        set_field(content, end, 'end', field, lambda count: count - 1)
    set_field(content, end, 'end', 5, lambda size: size - (stop - start))
    del content[start:stop]
    refuse(tmp_path / 'a.pth', bytes(content), message)


@pytest.mark.parametrize(
    'char, message', [(b'\x01', 'control characters'), (b'/', 'a folder with data')]
)
def test_a_name_in_both_headers(tmp_path, char, message):
    content = repack(saved()).replace(b'data/0', b'data/' + char)
    refuse(tmp_path / 'a.pth', content, message)


@pytest.mark.parametrize('seed', range(4))
def test_spoilt_headers(tmp_path, seed):
    ends = set()
    for number in range(250):
        content, _ = spoil_headers(random.Random(1000 * seed + number), saved())
        ends.add(taken(tmp_path / 'a.pth', content))
    assert ends == {True, False}


def rewritten(change):
    """The records in an archive of zipfile, after a change to their list."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as old:
        records = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(buffer, 'w') as new:
        for name, content in change(records):
            new.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize(
    'change, message',
    [
        (lambda r: [*r, (r[0][0], b'x')], 'is there twice'),
        (lambda r: [*r, (r[0][0].upper(), b'x')], 'is not in the folder|twice'),
        (lambda r: [*r, ('archive/DATA/0', bytes(24))], 'is there twice'),
        (lambda r: [*r, ('other/data/9', b'')], 'is not in the folder'),
        (lambda r: [(n.split('/')[-1], c) for n, c in r], 'no folder'),
        (lambda r: [p for p in r if 'data.pkl' not in p[0]], 'has no data.pkl'),
        (lambda r: [p for p in r if 'data/1' not in p[0]], 'should have 24 bytes'),
        (lambda r: [(n, c[:4]) for n, c in r if 'data/' in n] + r[:1], '24 bytes'),
    ],
)
def test_other_records(tmp_path, change, message):
    refuse(tmp_path / 'a.pth', rewritten(change), f'truncated or not .*({message})')


@pytest.mark.parametrize(
    'change',
    [
        lambda c: c + b'\0',
        lambda c: c[:-1],
        lambda c: c[:-2] + b'\1\0x',
        lambda c: c + c,
        lambda c: c[:-22],
        lambda c: c[:4] + c,
    ],
)
@pytest.mark.parametrize('how', ['torch', 'plain'])
def test_bytes_around_the_archive(tmp_path, change, how):
    content = saved() if how == 'torch' else repack(saved())
    refuse(tmp_path / 'a.pth', change(content), 'truncated or not a checkpoint')


def test_two_names_for_a_record(tmp_path):
    """Python's zipfile takes the second, torch the first."""
    content = repack(saved(), extra=OWN_NAME)
    refuse(tmp_path / 'a.pth', content, 'it has two names')


# ----------------------------------------------------------- archives of others
def test_a_compressed_archive(tmp_path):
    path = tmp_path / 'a.pth'
    with (
        zipfile.ZipFile(io.BytesIO(saved({'w': torch.zeros(999)}))) as old,
        zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    refuse(path, path.read_bytes(), 'compressed archive.*save it with torch.save')


def test_an_archive_of_files(tmp_path):
    path = tmp_path / 'a.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('best/epoch_3.pth', saved())
    refuse(path, path.read_bytes(), 'unpack it, and give one of best/epoch_3.pth')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_torchscript_program(tmp_path):
    path = tmp_path / 'a.pt'
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    refuse(path, path.read_bytes(), 'TorchScript program: save its weights alone')


def test_an_archive_without_check_sums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        content = saved()
    finally:
        torch.serialization.set_crc32_options(True)
    refuse(tmp_path / 'a.pth', content, 'has no check sums.*save it with torch.save')


def test_a_trusted_file_is_checked_too(tmp_path):
    content = bytearray(saved())
    content[find_headers(content)['central'][-2] + 38] |= 0x10
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    trust(path)
    with pytest.raises(CheckpointError, match='attributes'):
        read_state_dict(path)
    with pytest.raises(ValueError, match='attributes'):
        unpickle(path, trusted=True)
