"""Spoil the headers of a zip archive field by field, its records stay as they are."""

import io
import struct
import zipfile

# Fields of each header: position and bytes.
_FIELDS = {
    'central': (4, *[2] * 6, *[4] * 3, *[2] * 5, 4, 4),
    'local': (4, *[2] * 5, *[4] * 3, 2, 2),
    'descriptor': (4, 4, 4, 4),
    'end': (4, *[2] * 4, 4, 4, 2),
    'end64': (4, 8, 2, 2, 4, 4, 8, 8, 8, 8),
    'locator': (4, 4, 8, 4),
}
_LENGTHS = {kind: sum(fields) for kind, fields in _FIELDS.items()}


class Unseekable(io.RawIOBase):
    """A file that zipfile can only append to, so that it writes data descriptors."""

    def __init__(self):
        super().__init__()
        self.content = b''

    def writable(self):
        return True

    def write(self, data):
        self.content += bytes(data)
        return len(data)


def repack(content, how='plain', extra=b''):
    """The same records in an archive of Python's zipfile, not compressed.

    Args:
        content: Bytes of an archive.
        how: ``'plain'``, ``'streamed'`` (sizes behind the records), or ``'zip64'``
            (with the field for large sizes).
        extra: Extra fields of each record.
    """
    buffer = Unseekable() if how == 'streamed' else io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, 'w') as new,
    ):
        for entry in old.infolist():
            info = zipfile.ZipInfo(entry.filename, (2026, 1, 2, 3, 4, 6))
            info.external_attr, info.extra = 0o644 << 16, extra
            with new.open(info, 'w', force_zip64=how == 'zip64') as file:
                file.write(old.read(entry))
    return buffer.content if how == 'streamed' else buffer.getvalue()


def find_headers(content):
    """Where the headers are: positions by kind; of records in the same order."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries, position = archive.infolist(), archive.start_dir
    found = {kind: [] for kind in _FIELDS}
    for entry in entries:
        found['central'].append(position)
        position += _LENGTHS['central'] + sum(
            struct.unpack_from('<3H', content, position + 28)
        )
        start = entry.header_offset
        found['local'].append(start)
        data = start + 30 + sum(struct.unpack_from('<2H', content, start + 26))
        if entry.flag_bits & 8:
            found['descriptor'].append(data + entry.file_size)
    end = len(content) - _LENGTHS['end']
    found['end'].append(end)
    if content[end - 20 : end - 16] == b'PK\x06\x07':
        found['locator'].append(end - 20)
        found['end64'].append(end - 76)
    return {kind: places for kind, places in found.items() if places}


def set_field(content, place, kind, field, change):
    """Change a number in the header of this kind at this place."""
    offset, size = sum(_FIELDS[kind][:field]), _FIELDS[kind][field]
    span = slice(place + offset, place + offset + size)
    value = change(int.from_bytes(content[span], 'little')) % 2 ** (8 * size)
    content[span] = value.to_bytes(size, 'little')


def _spoil_field(rng, content, found):
    """Another value in one field of one header."""
    kind = rng.choice(sorted(found))
    place = rng.choice(found[kind])
    field = rng.randrange(len(_FIELDS[kind]))
    offset, size = sum(_FIELDS[kind][:field]), _FIELDS[kind][field]
    start = place + offset
    value = int.from_bytes(content[start : start + size], 'little')
    other = rng.choice(found[kind]) + offset
    new = rng.choice(
        (
            value ^ 1 << rng.randrange(8 * size),
            value ^ 1 << rng.randrange(8 * size),
            value + rng.choice((-64, -4, -1, 1, 4, 64)),
            rng.choice((0, 1, 8, 9, 20, 0x10, 0x800, 2**32 - 1, 2**64 - 1)),
            len(content),
            rng.randrange(len(content)),
            int.from_bytes(content[other : other + size], 'little'),
        )
    )
    packed = (new % 2 ** (8 * size)).to_bytes(size, 'little')
    content[start : start + size] = packed
    # The same in the other header of the record.
    twin = {'central': 'local', 'local': 'central'}.get(kind)
    if twin and rng.random() < 0.3:
        field += {'central': -1, 'local': 1}[kind]
        if 1 <= field < len(_FIELDS[twin]) and _FIELDS[twin][field] == size:
            start = found[twin][found[kind].index(place)] + sum(_FIELDS[twin][:field])
            content[start : start + size] = packed
    return f'{kind} at {place}, field {field}'


def _spoil_name(rng, content, found):
    """Another name in one or both headers of a record, or those of two swapped."""
    kinds = rng.choice((['central'], ['local'], ['central', 'local']))
    index, other = (rng.randrange(len(found['central'])) for _ in range(2))
    swap, place, char = rng.random() < 0.5, rng.random(), rng.choice(b'/\\\0.A01z\xff')
    for kind in kinds:
        spans = []
        for header in (found[kind][index], found[kind][other]):
            at = header + (28 if kind == 'central' else 26)
            start = header + _LENGTHS[kind]
            spans.append((start, start + struct.unpack_from('<H', content, at)[0]))
        (a, b), (c, d) = spans
        if swap and b - a == d - c:
            content[a:b], content[c:d] = content[c:d], content[a:b]
        elif b > a:
            # A length that was spoiled before may lead beyond the file.
            content[min(a + int(place * (b - a)), len(content) - 1)] = char
    return f'names of {kinds}'


def _spoil_extra(rng, content, found):
    """Flip a bit behind a header: in its name, its extra fields or a bit of data."""
    kind = rng.choice(sorted(found))
    start = rng.choice(found[kind]) + _LENGTHS[kind] + rng.randrange(60)
    if start < len(content):
        content[start] ^= 1 << rng.randrange(8)
    return f'bit at {start}'


def _move_record(rng, content, found):
    """Insert or remove bytes between records, or behind the end."""
    place = rng.choice(found['local'] + found['end'] + found['central'][:1])
    place = rng.choice((place, len(content)))
    if rng.random() < 0.5:
        content[place:place] = rng.randbytes(rng.choice((1, 22, 64)))
    else:
        del content[place - 16 : place]
    return f'move at {place}'


def _swap_entries(rng, content, found):
    """Two entries of the directory change places, or one is there twice."""
    a, b = sorted(rng.choice(found['central']) for _ in range(2))
    spans = []
    for start in (a, b):
        lengths = struct.unpack_from('<3H', content, start + 28)
        spans.append(slice(start, start + _LENGTHS['central'] + sum(lengths)))
    first, second = (bytes(content[span]) for span in spans)
    if a != b and rng.random() < 0.5:
        content[spans[1]], content[spans[0]] = first, second
    elif len(first) == len(second):
        content[spans[1]] = first
    return f'entries at {a} and {b}'


_STEPS = (
    *[_spoil_field] * 8,
    *[_spoil_name] * 2,
    _spoil_extra,
    _move_record,
    _swap_entries,
)


def spoil_headers(rng, content):
    """Spoil one to three headers of an archive of torch or of zipfile.

    Returns:
        The bytes, and what was done.
    """
    form = rng.choice(('torch', 'torch', 'torch', 'plain', 'streamed', 'zip64'))
    if form != 'torch':
        content = repack(content, form)
    found = find_headers(content)
    content, done = bytearray(content), [form]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        done.append(rng.choice(_STEPS)(rng, content, found))
    return bytes(content), '; '.join(done)
