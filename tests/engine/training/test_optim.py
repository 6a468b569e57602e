import torch
from mmengine.optim import build_optim_wrapper
from torch import nn


def test_forward_in_bfloat16_weights_in_float32():
    net = nn.Linear(4, 3)
    wrapper = build_optim_wrapper(
        net, dict(type='mmvssm.Bf16OptimWrapper', optimizer=dict(type='SGD', lr=0.5))
    )
    before = net.weight.detach().clone()
    with wrapper.optim_context(net):
        out = net(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    assert net.weight.grad is None or net.weight.grad.dtype == torch.float32
    torch.testing.assert_close(net.weight, before - 1.0)
    assert net(torch.ones(2, 4)).dtype == torch.float32
