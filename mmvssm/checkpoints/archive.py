"""Check the zip archive of ``torch.save`` before torch reads it.

torch's reader compares no check sums. It also believes headers that other readers
ignore: it takes a record that is marked as a folder for read, and returns whatever was
in memory. So each byte that it could act on is checked here: the headers, which must
agree with each other, and the check sums. Only what torch and plain zip programs write
passes: records that are not compressed, one after the other, with nothing in between.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

from mmvssm.errors import CheckpointError

LOCAL_SIGNATURE = b'PK\x03\x04'
_CENTRAL_SIGNATURE = b'PK\x01\x02'
_DESCRIPTOR_SIGNATURE = b'PK\x07\x08'
_END_SIGNATURE = b'PK\x05\x06'
_END64_SIGNATURE = b'PK\x06\x06'
_LOCATOR_SIGNATURE = b'PK\x06\x07'

_LOCAL = struct.Struct('<4s5H3I2H')
_CENTRAL = struct.Struct('<4s6H3I5H2I')
_END = struct.Struct('<4s4H2IH')
_END64 = struct.Struct('<4sQ2H2I4Q')
_LOCATOR = struct.Struct('<4sIQI')

# Flags: sizes follow the data (in a data descriptor); the name is UTF-8.
_STREAMED, _UTF8 = 0x8, 0x800
# Extra fields: large sizes; another name for the record.
_ZIP64, _OTHER_NAME = 0x1, 0x7075
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
# Attributes of MS-DOS that a plain file may have: read-only, archive.
_PLAIN_DOS = 0x21
# Types of a file of Unix: not given, plain.
_PLAIN_UNIX = (0, 0o100000)
# torch copies names into a buffer of 512 bytes.
_LONGEST_NAME = 511
_CHUNK = 2**20
_FILES = (b'.pth', b'.pt', b'.safetensors', b'.bin', b'.ckpt', b'.tar')


class _Local(NamedTuple):
    """The header in front of a record."""

    signature: bytes
    needed: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    name_length: int
    extra_length: int


class _Central(NamedTuple):
    """The header of a record in the directory at the end."""

    signature: bytes
    made_by: int
    needed: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    name_length: int
    extra_length: int
    comment_length: int
    disk: int
    internal: int
    external: int
    offset: int


class _Entry(NamedTuple):
    """A record as the directory declares it."""

    name: bytes
    header: _Central
    extra: bytes
    packed: int
    size: int
    offset: int


class Archive:
    """A checked archive.

    Attributes:
        path: The file.
        sizes: Bytes of each record, by its name without the folder that all are in.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sizes: dict[bytes, int] = {}
        self._offsets: dict[bytes, int] = {}

    def add(self, name: bytes, offset: int, size: int) -> None:
        """Add a record whose data starts at this byte of the file."""
        self.sizes[name], self._offsets[name] = size, offset

    def read(self, name: bytes) -> bytes:
        """The content of a record."""
        with self.path.open('rb') as file:
            return _bytes_at(file, self._offsets[name], self.sizes[name])


def check_archive(path: Path) -> Archive | None:
    """Check headers and check sums of an archive of ``torch.save``.

    Args:
        path: Any file.

    Returns:
        What torch will find in it; None for a file that is no archive.

    Raises:
        CheckpointError: It is an archive of another kind, or a check sum is wrong.
        ValueError: A header is damaged.
    """
    with path.open('rb') as file:
        # torch uses the same test. Its older format has no check sums.
        if file.read(4) != LOCAL_SIGNATURE:
            return None
        total = file.seek(0, 2)
        start, stop, count = _find_directory(file, total)
        entries = list(_read_directory(_bytes_at(file, start, stop - start)))
        if len(entries) != count:
            raise ValueError(f'{count} records are declared, {len(entries)} are listed')
        _refuse_other_kinds(path, entries)
        folder = _check_names(entries)
        archive = Archive(path)
        entries.sort(key=lambda entry: entry.offset)
        expected = 0
        wrong = []
        ends = [*(entry.offset for entry in entries[1:]), start]
        for entry, end in zip(entries, ends, strict=True):
            _check_entry(entry)
            if entry.offset != expected:
                _refuse(entry, 'it does not start where the one before it ends')
            data = _check_local(file, entry, end)
            if _check_sum(file, data, entry.size) != entry.header.crc:
                wrong.append(entry)
            archive.add(entry.name.removeprefix(folder), data, entry.size)
            expected = end
    if wrong:
        _refuse_sums(path, entries, wrong)
    return archive


def _bytes_at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    found = file.read(size)
    if len(found) != size:
        raise ValueError('it is shorter than its headers say')
    return found


def _refuse(entry: _Entry, problem: str) -> NoReturn:
    raise ValueError(f'headers of the record {entry.name[:200]!r}: {problem}')


def _find_directory(file: IO[bytes], total: int) -> tuple[int, int, int]:
    """Where the directory starts and stops, and how many records it has."""
    end = total - _END.size
    if end < 0:
        raise ValueError('its end record is missing')
    signature, *disks, here, count, size, start, comment = _END.unpack(
        _bytes_at(file, end, _END.size)
    )
    if signature != _END_SIGNATURE or comment:
        raise ValueError('it does not end with an end record without a comment')
    if any(disks) or here != count:
        raise ValueError('its end record is that of an archive in several parts')
    stop = end
    locator = end - _LOCATOR.size
    if (
        locator >= 0 and _bytes_at(file, locator, 4) == _LOCATOR_SIGNATURE
    ):  # Counts and sizes may be too large for the plain end record.
        stop = locator - _END64.size
        _, disk, offset, parts = _LOCATOR.unpack(
            _bytes_at(file, locator, _LOCATOR.size)
        )
        if (disk, offset, parts) != (0, stop, 1) or stop < 0:
            raise ValueError('its locator of the end record is wrong')
        short = count, size, start
        signature, length, _, _, *disks, here, count, size, start = _END64.unpack(
            _bytes_at(file, stop, _END64.size)
        )
        limits = _MAX16, _MAX32, _MAX32
        if (
            (signature, length) != (_END64_SIGNATURE, _END64.size - 12)
            or any(disks)
            or here != count
            or any(
                few not in (many, limit)
                for few, many, limit in zip(
                    short, (count, size, start), limits, strict=True
                )
            )
        ):
            raise ValueError('its two end records do not agree')
    if start + size != stop:
        raise ValueError('its directory does not end where the end record starts')
    return start, stop, count


def _read_directory(directory: bytes) -> Iterator[_Entry]:
    """The records of the directory, which it must fill."""
    position = 0
    while position < len(directory):
        if len(directory) - position < _CENTRAL.size:
            raise ValueError('its directory is cut off')
        header = _Central(*_CENTRAL.unpack_from(directory, position))
        position += _CENTRAL.size
        if header.signature != _CENTRAL_SIGNATURE:
            raise ValueError('its directory is damaged')
        lengths = header.name_length, header.extra_length, header.comment_length
        if sum(lengths) > len(directory) - position:
            raise ValueError('its directory is cut off')
        name = directory[position : position + lengths[0]]
        position += lengths[0]
        extra = directory[position : position + lengths[1]]
        position += lengths[1] + lengths[2]
        yield _with_large_sizes(name, header, extra)


def _with_large_sizes(name: bytes, header: _Central, extra: bytes) -> _Entry:
    """Sizes and offset of a record, which may be in an extra field."""
    short = header.size, header.packed, header.offset
    entry = _Entry(name, header, extra, header.packed, header.size, header.offset)
    large = [body for kind, body in _extra_fields(entry, extra) if kind == _ZIP64]
    if [len(body) for body in large] != [8 * short.count(_MAX32)] * (_MAX32 in short):
        _refuse(entry, 'the field of large sizes is wrong')
    if large:
        values = iter(struct.unpack(f'<{len(large[0]) // 8}Q', large[0]))
        size, packed, offset = (
            next(values) if value == _MAX32 else value for value in short
        )
        entry = entry._replace(size=size, packed=packed, offset=offset)
    return entry


def _extra_fields(entry: _Entry, extra: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(extra):
        if len(extra) - position < 4:
            _refuse(entry, 'the extra fields are damaged')
        kind, length = struct.unpack_from('<2H', extra, position)
        position += 4
        if length > len(extra) - position:
            _refuse(entry, 'the extra fields are damaged')
        if kind == _OTHER_NAME:
            _refuse(entry, 'it has two names')
        yield kind, extra[position : position + length]
        position += length


def _refuse_other_kinds(path: Path, entries: list[_Entry]) -> None:
    """Say what to do with an archive that is not of ``torch.save``."""
    names = [entry.name for entry in entries]
    inside = {name.partition(b'/')[2] for name in names}
    files = [name for name in names if name.endswith(_FILES)]
    if b'data.pkl' not in inside and files:
        shown = ', '.join(name[:200].decode(errors='replace') for name in files[:4])
        raise CheckpointError(
            f'{path} is an archive of files: unpack it, and give one of {shown}'
        )
    if b'constants.pkl' in inside:
        raise CheckpointError(
            f'{path} is a TorchScript program: save its weights alone, '
            f'torch.save(torch.jit.load({str(path)!r}).state_dict(), NEW_FILE)'
        )
    if any(entry.header.method == 8 and entry.packed < entry.size for entry in entries):
        raise CheckpointError(
            f'{path} is a compressed archive, which torch.save does not write: unpack '
            'it, and pack it without compression (zip -0 -r), or read it with '
            'torch.load and save it with torch.save'
        )


def _check_names(entries: list[_Entry]) -> bytes:
    """The folder that all records are in, with its slash."""
    names = [entry.name for entry in entries]
    folder, slash, _ = names[0].partition(b'/') if names else (b'', b'', b'')
    if not slash:
        raise ValueError('it has no folder with the records')
    seen = set()
    for entry in entries:
        name = entry.name
        if not name.startswith(folder + slash):
            _refuse(entry, f'it is not in the folder {folder!r}')
        if len(name) > _LONGEST_NAME or any(c < 32 or c == 127 for c in name):
            _refuse(entry, 'the name is too long or has control characters')
        # torch looks names up without regard to upper and lower case.
        if name.lower() in seen:
            _refuse(entry, 'it is there twice')
        seen.add(name.lower())
    return folder + slash


def _check_entry(entry: _Entry) -> None:
    """Check what the directory says of a record, for itself."""
    header = entry.header
    if header.flags & ~(_STREAMED | _UTF8):
        _refuse(entry, f'flags {header.flags:#x}')
    if header.method or entry.packed != entry.size:
        _refuse(entry, f'compression method {header.method}, or two sizes')
    if header.comment_length or header.disk or header.internal > 1:
        _refuse(entry, 'a comment, several parts, or unknown attributes')
    if entry.name.endswith(b'/'):
        if entry.size:
            _refuse(entry, 'a folder with data')
        return
    unix = header.external >> 16 & 0o170000
    if header.external & 0xFFFF & ~_PLAIN_DOS or unix not in _PLAIN_UNIX:
        _refuse(entry, f'attributes {header.external:#x}, not those of a file')


def _check_local(file: IO[bytes], entry: _Entry, end: int) -> int:
    """Compare the header in front of a record; where its data starts.

    Args:
        end: Where the next record or the directory starts.
    """
    central, streamed = entry.header, bool(entry.header.flags & _STREAMED)
    local = _Local(*_LOCAL.unpack(_bytes_at(file, entry.offset, _LOCAL.size)))
    rest = file.read(local.name_length + local.extra_length)
    name, extra = rest[: local.name_length], rest[local.name_length :]
    if local.signature != LOCAL_SIGNATURE or name != entry.name:
        _refuse(entry, 'another record is where it should be')
    if local[2:6] != central[3:7]:
        _refuse(entry, 'flags, method or time differ in its two headers')
    large = [body for kind, body in _extra_fields(entry, extra) if kind == _ZIP64]
    if len(large) > 1 or not all(_fits(body, entry, streamed) for body in large):
        _refuse(entry, 'the field of large sizes is wrong')
    # A program that cannot go back in the file writes zeros, and the sizes behind.
    sums = (central.crc, 0) if streamed else (central.crc,)
    known = {entry.size} if entry.size < _MAX32 else set()
    known |= {0} if streamed else set()
    known |= {_MAX32} if large and len(large[0]) >= 16 else set()
    if local.crc not in sums or not {local.size, local.packed} <= known:
        _refuse(entry, 'check sum or size differ in its two headers')
    data = entry.offset + _LOCAL.size + len(rest)
    behind = end - data - entry.size
    if behind < 0:
        _refuse(entry, 'it is larger than its place in the file')
    if behind == 0 and not (streamed and entry.size):
        return data
    found = _bytes_at(file, data + entry.size, behind)
    values = central.crc, entry.size, entry.size
    forms = [_DESCRIPTOR_SIGNATURE + struct.pack('<I2Q', *values)]
    if entry.size <= _MAX32:
        forms.append(_DESCRIPTOR_SIGNATURE + struct.pack('<3I', *values))
    if not streamed or found not in forms:
        _refuse(entry, 'what follows it is not what its headers say')
    return data


def _fits(body: bytes, entry: _Entry, streamed: bool) -> bool:
    """Whether a field of large sizes in front of a record is right.

    torch writes the sizes if they are large, and the offset if it is large.
    """
    if len(body) not in (8, 16, 24):
        return False
    values = struct.unpack(f'<{len(body) // 8}Q', body)
    sizes = (entry.size, 0) if streamed else (entry.size,)
    right = all(value in sizes for value in values[:2]) or len(body) == 8
    return right and (len(body) == 16 or values[-1] == entry.offset)


def _check_sum(file: IO[bytes], offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise ValueError('it is shorter than its headers say')
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk)
    return crc


def _refuse_sums(path: Path, entries: list[_Entry], wrong: list[_Entry]) -> NoReturn:
    if not any(entry.header.crc for entry in entries):
        raise CheckpointError(
            f'{path} has no check sums, as after torch.serialization.set_crc32_options'
            '(False): read it with torch.load, and save it with torch.save without that'
        )
    names = ', '.join(entry.name[:200].decode(errors='replace') for entry in wrong[:4])
    raise CheckpointError(
        f'{path} is damaged: check sum of {names}; download or copy it again'
    )
