"""What processes tell each other between iterations."""

import subprocess
import sys

_PROCESS = """
import sys
import torch.distributed as dist
from mmvssm.engine.launching import ranks

rank, folder = int(sys.argv[1]), sys.argv[2]
for world in range(2):
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/{world}', rank=rank, world_size=2)
    first, second = ranks.Ranks(), ranks.Ranks()
    assert first.group is second.group
    for value in (rank, '', 'text' * (1 + 99 * rank)):
        told = second.gather(value)
        assert len(told) == 2 and told[rank] == value
    assert first.gather(rank) == [0, 1]
    assert [first.any(rank == 1), second.any(False)] == [True, False]
    dist.destroy_process_group()
"""


def test_ranks_share_one_group_in_each_world(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, '-c', _PROCESS, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
