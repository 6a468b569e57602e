"""Write weights, whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from mmvssm.checkpoints.canonical import Checkpoint


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write ``.pth`` (mmengine's format) or ``.safetensors``.

    The file gets its name only when it is complete.

    Args:
        checkpoint: What :func:`mmvssm.checkpoints.convert` returned.
        path: The file to write. Its suffix chooses the format.

    Raises:
        ValueError: The file has another suffix.
    """
    meta = dict(
        family=checkpoint.family.title,
        contents=checkpoint.contents,
        arch=checkpoint.arch,
        # As text, which is all that safetensors takes.
        grids=json.dumps(checkpoint.grids),
    )
    write_tensors(checkpoint.state_dict(), path, meta)


def write_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | Path, meta: dict[str, str]
) -> None:
    """Write tensors by name; see :func:`save_checkpoint`.

    Args:
        tensors: By name.
        path: Where to; the suffix chooses the form.
        meta: What the file says of itself.
    """
    path = Path(path)
    if path.suffix not in ('.pth', '.safetensors'):
        raise ValueError(
            f'cannot write {path.name!r}; its suffix must be .pth or .safetensors'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Heads can share memory with each other; safetensors refuses that.
    state = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        if path.suffix == '.pth':
            torch.save(dict(meta=meta, state_dict=state), temporary)
        else:
            from safetensors.torch import save_file

            save_file(state, temporary, metadata=meta)
        # mkstemp makes files that only their owner can read.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
