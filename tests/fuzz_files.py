"""Checkpoints of every family, and ways to spoil them."""

import argparse
import io
import json
import pickletools
import random
import struct
import zipfile
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save as save_safetensors

from checkpoints import files, isotropic_files
from fuzz_headers import spoil_headers
from mmvssm.backbones import MLLA, MambaR, Vim
from mmvssm.heads import ClassificationHead, ImageClassifier

MLLA_ARCH = dict(depths=(1, 2, 1, 1), dims=8, num_heads=(2, 2, 4, 4))
FORMATS = ('zip', 'legacy', 'safetensors')


def mlla_classifier():
    backbone = MLLA(MLLA_ARCH, out_indices=(3,), out_norm=False)
    return ImageClassifier(backbone, ClassificationHead(64, 5))


def published_mlla(model):
    return {
        key.removeprefix('classifier.'): value
        for key, value in files.published(model).items()
    }


def old_names(model):
    return files.to_v0_old(files.published(model))


# Name: how the model is built, and how the names of a file are made of its own.
MODELS = {
    'vmamba': (partial(files.classifier, files.V2), files.published),
    'vmamba-v0': (partial(files.classifier, files.V0), old_names),
    'vmamba-segmentor': (partial(files.Segmentor, files.V2), files.randomised),
    'vim': (isotropic_files.vim_classifier, isotropic_files.published),
    'vim-segmentor': (
        lambda: isotropic_files.Segmentor(Vim(isotropic_files.ARCH, img_size=56)),
        isotropic_files.published_segmentor,
    ),
    'vim-detector': (
        lambda: isotropic_files.Detector(Vim(isotropic_files.ARCH, img_size=56)),
        isotropic_files.published_detector,
    ),
    'mambar': (isotropic_files.mambar_classifier, isotropic_files.published),
    'mambar-segmentor': (
        lambda: isotropic_files.Segmentor(MambaR(isotropic_files.ARCH, img_size=56)),
        files.randomised,
    ),
    'mlla': (mlla_classifier, published_mlla),
}


@dataclass
class Case:
    """A spoilt file, and what may be in a model that took it.

    Attributes:
        content: Of the file.
        tensors: Each that the file holds, by whatever name.
        changed: Bytes that were changed where the format has no check sums.
        how: The mutation, in words.
    """

    content: bytes
    tensors: list = field(default_factory=list)
    changed: int = 0
    how: str = ''


def wrap(state, form):
    """What a training leaves beside the weights."""
    if form == 'safetensors':
        return state
    history = HistoryBuffer(np.arange(3.0), np.ones(3, dtype='int64'))
    return dict(
        meta=dict(epoch=0, iter=7, cfg='model = None'),
        state_dict=state,
        message_hub=dict(log_scalars={'loss': history}, runtime_info={}),
        optimizer=dict(state={}, param_groups=[dict(lr=0.1, params=[0])]),
        args=argparse.Namespace(lr=0.1),
    )


def write(content, form):
    """Bytes of a file of torch.save or safetensors."""
    if form == 'safetensors':
        tensors = {str(k): v for k, v in content.items()}
        return save_safetensors({k: v.contiguous() for k, v in tensors.items()})
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=form == 'zip')
    return buffer.getvalue()


# ------------------------------------------------------------------------- bytes
def spoil_bytes(rng, content, form):
    """Flip, cut, insert, repeat or overwrite bytes anywhere."""
    content = bytearray(content)
    # Headers and names are a small part of a file, and most of what can break.
    edge = rng.choice((len(content), 4096, -4096))
    low, high = (0, edge) if edge > 0 else (len(content) + edge, len(content))
    position = rng.randrange(max(0, low), min(high, len(content)))
    length = rng.choice((1, 8, 100, 5000))
    how = rng.choice(
        ('flip', 'flip', 'flip', 'cut', 'insert', 'remove', 'fill', 'copy')
    )
    # What comes after it moves, or is any other part of the file.
    changed = 2**40
    if how == 'flip':
        changed = rng.randint(1, 8)
        for _ in range(changed):
            content[rng.randrange(max(0, low), min(high, len(content)))] ^= (
                1 << rng.randrange(8)
            )
    elif how == 'cut':
        del content[position:]
    elif how == 'insert':
        content[position:position] = rng.randbytes(length)
    elif how == 'remove':
        del content[position : position + length]
    elif how == 'fill':
        value = rng.choice((b'\0', b'\xff', b'P'))
        end = min(position + length, len(content))
        content[position:end] = value * (end - position)
    else:
        other = rng.randrange(len(content))
        piece = content[other : other + length]
        content[position : position + len(piece)] = piece
    return Case(bytes(content), changed=changed, how=f'{how} {length} at {position}')


# ----------------------------------------------------------------------- archive
_INTEGERS = {
    'BININT1': lambda value: b'K' + bytes([value % 256]),
    'BININT2': lambda value: b'M' + struct.pack('<H', value % 65536),
    'BININT': lambda value: b'J' + struct.pack('<i', (value + 2**31) % 2**32 - 2**31),
}
_HUGE = (0, 1, -1, 7, 255, 65535, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**62))


def spoil_archive(rng, content, form):
    """Change the pickle or the entries of an archive whose check sums are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(i.filename, archive.read(i)) for i in archive.infolist()]
    how = rng.choice(('number', 'number', 'number', 'byte', 'drop', 'double', 'entry'))
    where = next(i for i, (name, _) in enumerate(entries) if name.endswith('data.pkl'))
    name, pickled = entries[where]
    compression = zipfile.ZIP_STORED
    if how == 'number':
        for _ in range(rng.randint(1, 3)):
            pickled = _change_number(rng, pickled)
        entries[where] = (name, pickled)
    elif how == 'byte':
        pickled = bytearray(pickled)
        pickled[rng.randrange(len(pickled))] ^= 1 << rng.randrange(8)
        entries[where] = (name, bytes(pickled))
    elif how == 'drop':
        del entries[rng.randrange(len(entries))]
    elif how == 'double':
        entries.append((entries[where][0], rng.choice(entries)[1]))
    else:
        chosen = rng.randrange(len(entries))
        compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        size = rng.choice((0, 1, len(entries[chosen][1]) + 4, 10**7))
        entries[chosen] = (entries[chosen][0], bytes(size))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    # Numbers in a pickle say which bytes of its storage a tensor is.
    return Case(buffer.getvalue(), changed=2**40, how=f'archive: {how}')


def _change_number(rng, pickled):
    ops = list(pickletools.genops(pickled))
    found = [
        (op, position, following)
        for (op, _, position), (_, _, following) in zip(ops, ops[1:])
        if op.name in _INTEGERS
    ]
    op, start, end = rng.choice(found)
    value = rng.choice(_HUGE)
    if rng.random() < 0.5:
        packed = value.to_bytes(8, 'little', signed=True)
        new = b'\x8a' + bytes([len(packed)]) + packed
    else:
        new = _INTEGERS[op.name](value)
    return pickled[:start] + new + pickled[end:]


def spoil_zip_headers(rng, content, form):
    """Change the headers of an archive field by field."""
    content, how = spoil_headers(rng, content)
    return Case(content, how=f'headers: {how}')


def spoil_header(rng, content, form):
    """Change the header of a safetensors file, whose length stays right."""
    (length,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + length])
    entry = header[rng.choice(sorted(header))]
    how = rng.choice(('shape', 'dtype', 'offsets', 'length', 'depth'))
    if how == 'shape':
        entry['shape'] = [rng.choice(_HUGE) for _ in range(rng.randint(0, 4))]
    elif how == 'dtype':
        entry['dtype'] = rng.choice(('F64', 'I8', 'BF16', 'F8_E4M3', 'C64', 'X', 3))
    elif how == 'offsets':
        entry['data_offsets'] = [rng.choice(_HUGE), rng.choice(_HUGE)]
    elif how == 'depth':
        entry['shape'] = json.loads('[' * 500 + ']' * 500)
    text = json.dumps(header).encode()
    size = len(text) if how != 'length' else rng.choice((0, 2**20, 2**40, 2**63))
    spoilt = struct.pack('<Q', size) + text + content[8 + length :]
    return Case(spoilt, changed=2**40, how=f'header: {how}')


# ----------------------------------------------------------------------- content
def spoil_content(rng, state, form):
    """Rename, drop, reshape, retype or nest what the file holds."""
    state = dict(state)
    done = []
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        step = rng.choice(_STEPS)
        key = rng.choice(sorted(map(str, state)))
        if is_plain(state.get(key)):
            step(rng, state, key)
            done.append(f'{step.__name__} {key}')
    content = wrap(state, form)
    if form == 'safetensors':
        content = {
            key: value
            for key, value in state.items()
            if is_plain(value) and len(str(key)) < 10**4
        }
        if not content:
            content = {'x': torch.ones(1)}
        tensors = list(content.values())
        # What shares memory is refused on writing.
        content = {key: value.clone() for key, value in content.items()}
        return Case(write(content, form), tensors, how='; '.join(done))
    if rng.random() < 0.1:
        content = _nest(rng, content, state)
        done.append('nest')
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return Case(write(content, form), tensors, how='; '.join(done))


def is_plain(value):
    """Whether this is a tensor that can be changed further."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and not value.is_quantized
        # What is expanded has no room to be copied.
        and value.numel() < 10**6
    )


def rename(rng, state, key):
    value = state.pop(key)
    place = rng.randrange(len(key) + 1)
    new = rng.choice(
        (
            key[:place] + rng.choice('.0189xX_\n/é\0') + key[place + 1 :],
            key[:place] + key[place + 1 :],
            f'module.{key}',
            f'backbone.{key}',
            f'{rng.choice(sorted(map(str, state)) or ["x"])}.{key}',
            key.upper(),
            key.replace('layers.0', 'layers.99999999999999999999'),
            f'layers.{"9" * 5000}.blocks.0.op.A_logs',
            f'layers.{"9" * 5000}.{key}',
            'layers.' * 3000 + key,
            '',
        )
    )
    state[new] = value


def swap(rng, state, key):
    other = rng.choice(sorted(map(str, state)))
    if other in state:
        state[key], state[other] = state[other], state[key]


def drop(rng, state, key):
    if len(state) > 1:
        del state[key]


def reshape(rng, state, key):
    value = state[key]
    state[key] = rng.choice(
        (
            lambda: value.flatten(),
            lambda: value[None],
            lambda: value.reshape(-1, 1, 1, 1),
            lambda: value.mT if value.ndim > 1 else value.flatten()[:0],
            lambda: value[..., :-1] if value.ndim else value,
            lambda: torch.cat([value, value]) if value.ndim else value,
            lambda: torch.tensor(1.0),
            lambda: torch.empty(0),
            lambda: torch.empty(0, 5, 0),
            lambda: value.new_zeros(()).expand(2**40),
            lambda: value.new_zeros(()).expand(tuple(value.shape)),
            lambda: value.new_zeros(1).expand(2**20, 2**20),
            lambda: torch.zeros([1] * 40),
        )
    )()


def retype(rng, state, key):
    value = state[key].float()
    state[key] = rng.choice(
        (
            lambda: value.half(),
            lambda: value.double(),
            lambda: value.bfloat16(),
            lambda: value.long(),
            lambda: value > 0,
            lambda: value.to(torch.complex64),
            lambda: value * float('nan'),
            lambda: value.to_sparse() if value.ndim else value,
            lambda: value.to('meta'),
            lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            lambda: value.to(torch.float8_e4m3fn),
            lambda: torch.nn.Parameter(value),
        )
    )()


def replace(rng, state, key):
    state[key] = rng.choice((None, 'text', 3, [state[key]], {'x': state[key]}, b'x'))


def add(rng, state, key):
    new = rng.choice(
        (
            3,
            None,
            ('a', 1),
            'state_dict',
            'model',
            f'module.{key}',
            'pos_embed',
            'pos_embed_cls',
            'layers.0.mixer.A_b_log',
            'layers.0.blocks.0.attn.qk.weight',
            'other.layers.0.blocks.0.op.A_logs',
            'cls_token',
        )
    )
    state[new] = state[key]


_STEPS = (rename, rename, swap, drop, reshape, reshape, retype, replace, add)


def _nest(rng, content, state):
    how = rng.randrange(5)
    if how == 0:
        content['model'] = content
        del content['state_dict']
    elif how == 1:
        content['state_dict'] = content
    elif how == 2:
        for _ in range(rng.choice((3, 200))):
            content = {'model': content}
    elif how == 3:
        content = [content]
    else:
        content = rng.choice((None, 3, 'x', [], {}, torch.ones(2), {'model': {}}))
    return content


def make_case(rng: random.Random, state, form):
    """Spoil a file of this state dict in one way or another."""
    kinds = [spoil_content, spoil_bytes]
    if form == 'zip':
        kinds += [spoil_archive, spoil_zip_headers]
    elif form == 'safetensors':
        kinds.append(spoil_header)
    kind = rng.choice(kinds)
    if kind is spoil_content:
        return kind(rng, state, form)
    case = kind(rng, write(wrap(state, form), form), form)
    case.tensors = list(state.values())
    if form == 'zip' and kind is spoil_bytes:
        case.changed = 0
    return case
