"""Devices without float64 get along: the ``torch`` backend asks for none.

Where a device matters it is torch's meta device: like them it is not the CPU.
"""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from families import FAMILIES
from mmvssm.ops import use_backend
from mmvssm.ops.leaves import leaves_of

from .ops_under_test import SMALL, case_name

FLOATS = (torch.float32, torch.bfloat16)


class NoFloat64(TorchDispatchMode):
    """Refuse float64 tensors on one device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == 'mmvssm':
            # What the op does is asked of torch anew, so that it is seen here.
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        out = function(*args, **kwargs)
        for x in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.device.type == self.device:
                assert x.dtype != torch.float64, function
        return out


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('make', SMALL, ids=case_name)
def test_ops(make, device, dtype):
    case = make(*SMALL[make], dtype=dtype)
    call, op = case.asked('torch'), case.op
    leaves = [
        None if x is None else x.detach().to(device).requires_grad_(x.requires_grad)
        for x in leaves_of(call.inputs)
    ]
    inputs, _ = op.pack(leaves, call.options)
    call = call._replace(inputs=inputs)
    with NoFloat64(device):
        function, arguments = op.route(call)
        outputs = op.outputs(call, function(*arguments))
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        ones = [torch.ones_like(y) for y in outputs]
        grads = torch.autograd.grad(outputs, wanted, ones)
    assert wanted and all(x.device.type == device for x in (*outputs, *grads))


@pytest.mark.parametrize(
    'name, options', [*((name, {}) for name in FAMILIES), ('vim', dict(rope=True))]
)
def test_families(name, options):
    net = FAMILIES[name](**options).to('meta')
    images = torch.empty(1, 3, 48, 64, device='meta')
    with NoFloat64('meta'), use_backend('torch'):
        outputs = net(images)
        torch.autograd.grad(
            outputs,
            list(net.parameters()),
            [torch.ones_like(y) for y in outputs],
            allow_unused=True,
        )


def test_the_mode_sees_float64():
    x = torch.ones(2)
    with NoFloat64('cpu'):
        x + 1
        with pytest.raises(AssertionError, match='_to_copy'):
            x.double()
        with pytest.raises(AssertionError, match='arange'):
            torch.arange(3, dtype=torch.float64)
