"""DTensors, which torch's fully_shard and tensor parallelism make."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from .ops_under_test import SMALL, case_name


@pytest.fixture(scope='module')
def mesh():
    store = dist.HashStore()
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield init_device_mesh('cpu', (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('which', ['first', 'last', 'all'])
@pytest.mark.parametrize('backend', ['reference', 'torch', None])
@pytest.mark.parametrize('make', SMALL, ids=case_name)
def test_shards_are_refused(make, backend, which, gradients, mesh):
    case = make(*SMALL[make])
    names = list(case.inputs)
    chosen = dict(first=names[:1], last=names[-1:], all=names)[which]
    inputs = dict(case.inputs)
    for key in chosen:
        inputs[key] = distribute_tensor(inputs[key].detach(), mesh, [Shard(0)])
        inputs[key].requires_grad_()
    refused = pytest.raises(TypeError, match='is a DTensor .*full_tensor')
    with torch.set_grad_enabled(gradients), refused:
        case.call(inputs, backend=backend)
