"""What the processes of a training tell each other between iterations."""

import os
import weakref

import torch
import torch.distributed as dist

_VARIABLES = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


def rank_by_launcher() -> int:
    """This process's rank, before the processes know each other, too; 0 if alone."""
    return int(next((os.environ[key] for key in _VARIABLES if os.environ.get(key)), 0))


# The group of each world that this process has joined and not left. One for all uses:
# each new group opens connections between all ranks.
_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Ranks:
    """Talk among all ranks over the CPU, or nothing where there is one only.

    A group of its own on gloo: on a GPU it does not wait for the kernels in
    flight, as a collective of NCCL followed by a look at its result would.
    """

    def __init__(self):
        several = dist.is_available() and dist.is_initialized()
        several = several and dist.get_world_size() > 1
        self.group = _shared_group() if several else None

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank; every rank must ask."""
        if self.group is None:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        return bool(votes)

    def gather(self, value: object) -> list:
        """``value`` of every rank, in their order; every rank must call it."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Wait for all ranks to come here."""
        if self.group is not None:
            dist.barrier(group=self.group)


def _shared_group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world not in _groups:
        _groups[world] = dist.new_group(backend='gloo')
    return _groups[world]
