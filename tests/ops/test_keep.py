"""Who asks torch's ops to ``keep`` what a backward pass needs."""

import pytest
import torch
from functorch.compile import aot_module
from torch.utils.checkpoint import checkpoint

from mmvssm.layers import SS2D

OPS_OF_SS2D = ['linear', 'ss2d_scan', 'linear']


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SS2D(8)


@pytest.fixture
def x():
    return torch.randn(2, 8, 7, 9, generator=torch.Generator().manual_seed(1))


def asked(module):
    """The ops of a graph, and what each one is to keep."""
    nodes = [
        node
        for part in module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == 'mmvssm'
    ]
    names = [node.target._schema.name.removeprefix('mmvssm::') for node in nodes]
    return names, [node.args[-2] for node in nodes]


@pytest.mark.parametrize('strict', [False, True])
def test_export(net, x, strict):
    trainable = torch.export.export(net, (x,), strict=strict)
    assert asked(trainable.graph_module) == (OPS_OF_SS2D, [True] * 3)
    trainable.module()(x).square().sum().backward()
    got = [p.grad for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for a, b in zip(got, (p.grad for p in net.parameters())):
        torch.testing.assert_close(a, b)

    with torch.no_grad():
        fixed = torch.export.export(net, (x,), strict=strict)
    assert asked(fixed.graph_module) == (OPS_OF_SS2D, [False] * 3)
    net.requires_grad_(False)
    frozen = torch.export.export(net, (x,), strict=strict)
    assert asked(frozen.graph_module) == (OPS_OF_SS2D, [False] * 3)
    net.requires_grad_(True)
    with pytest.raises(RuntimeError, match='no backward pass'):
        fixed.module()(x).sum().backward()


def test_compile(net, x):
    """Each call by itself: without gradients, with them, and in a checkpoint."""
    seen = []

    def backend(module, inputs):
        seen.append(asked(module))
        return module.forward

    def function(x):
        with torch.no_grad():
            a = net(x)
        return net(a) + checkpoint(net, x, use_reentrant=False)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    compiled(x)
    with torch.no_grad():
        compiled(x)
    names = 3 * OPS_OF_SS2D
    assert seen == [(names, [False] * 3 + [True] * 6), (names, [False] * 9)]


def test_joint_graph(net, x):
    """AOTAutograd without Dynamo: the tensors that it traces with want gradients."""
    seen = []

    def forward(module, inputs):
        seen.append(asked(module))
        return module

    compiled = aot_module(net, fw_compiler=forward, bw_compiler=lambda graph, _: graph)
    compiled(x).square().sum().backward()
    got = [p.grad for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for a, b in zip(got, (p.grad for p in net.parameters())):
        torch.testing.assert_close(a, b)
    assert seen == [(OPS_OF_SS2D, [True] * 3)]


def test_trace(net, x):
    """torch.jit.trace compares its graph with one that it makes without gradients."""
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            module = torch.jit.trace(net, x)
        module(torch.randn(1, 8, 5, 5)).sum().backward()
