"""Several processes, on machines with accelerators and without."""

import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device

from mmvssm.engine.errors import UsageError

from .slurm import set_mpi_rendezvous, set_rendezvous

# Where a launcher leaves (rank, number of processes, rank on this machine, what
# else shows that it was at work: a batch script has the first three as well).
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_STEP_ID'),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
}


def prepare_launch(cfg: Config, launcher: str) -> None:
    """Set the launcher, and see to what mmengine assumes of a GPU.

    mmengine's launchers pin every process to a GPU and hand its number to
    DDP. Where there is no accelerator this joins the processes through gloo
    instead (mmengine leaves a process group alone that is already there) and
    sets ``model_wrapper_cfg`` for the CPU. SyncBN, which exists only for
    CUDA, becomes BN with a warning, and the config's ``sync_bn`` is dropped. Under
    Slurm and mpirun, with accelerators or without,
    :mod:`mmvssm.engine.launching.slurm` says where to meet.

    Args:
        cfg: Changed in place.
        launcher: ``'none'``, ``'pytorch'`` (torchrun), ``'slurm'`` or
            ``'mpi'``.

    Raises:
        UsageError: The launcher's environment variables are not there, or the
            processes do not find each other.
    """
    cfg.launcher = launcher
    if launcher == 'none':
        return
    absent = [key for key in _VARIABLES[launcher] if key not in os.environ]
    if absent:
        starter = {
            'pytorch': 'torchrun or tools/dist_train.sh',
            'slurm': 'srun or tools/slurm_train.sh',
            'mpi': 'mpirun',
        }[launcher]
        raise UsageError(
            f'--launcher {launcher} but {", ".join(absent)} is not set: '
            f'start the processes with {starter}.'
        )
    if launcher == 'slurm':
        set_rendezvous()
    elif launcher == 'mpi':
        set_mpi_rendezvous()
    if get_device() != 'cpu':
        return
    _init_gloo(cfg, launcher)
    cfg.model_wrapper_cfg = {
        'device_ids': None,
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **cfg.get('model_wrapper_cfg', {}),
    }
    asked = [node.pop('sync_bn', None) for node in (cfg, cfg.get('strategy') or {})]
    if (_replace_sync_bn(cfg.model) or any(asked)) and dist.get_rank() == 0:
        warnings.warn(
            'SyncBN needs CUDA: the processes use BN, each with '
            'the statistics of its own part of the batch.',
            stacklevel=2,
        )


def _init_gloo(cfg: Config, launcher: str) -> None:
    rank, size, local_rank, *_ = (os.environ[k] for k in _VARIABLES[launcher])
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank)
    absent = [key for key in ('MASTER_ADDR', 'MASTER_PORT') if key not in os.environ]
    if absent:
        raise UsageError(
            f'{", ".join(absent)} is not set: export the address of the machine that '
            'rank 0 runs on, and a port that is free there.'
        )
    dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
    timeout = dist_cfg.get('timeout')
    dist.init_process_group(
        'gloo', timeout=timedelta(seconds=timeout) if timeout else None
    )


def _replace_sync_bn(model: dict) -> bool:
    """Turn every ``type='SyncBN'`` into BN; True if there was any."""
    found = [node for node in _dicts(model) if node.get('type') == 'SyncBN']
    for node in found:
        node['type'] = 'BN'
    return bool(found)


def _dicts(node: Any) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        yield from _dicts(child)
