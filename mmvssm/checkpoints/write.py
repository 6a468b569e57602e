"""Write a converted checkpoint."""

import os
import tempfile
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
    path = Path(path)
    if path.suffix not in ('.pth', '.safetensors'):
        raise ValueError(
            f'cannot write {path.name!r}; its suffix must be .pth or .safetensors'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Heads can share memory with each other; safetensors refuses that.
    state = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in checkpoint.state_dict().items()
    }
    meta = dict(
        family=checkpoint.family.title,
        contents=checkpoint.contents,
        arch=checkpoint.arch,
    )
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
