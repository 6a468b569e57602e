"""All scan ops: right, reproducible, without waiting, in graphs and compiled."""

import contextlib

import pytest
import torch

from ops.scan_inputs import as_double, gradients, relative_error

from .on_device import CUDA, DETERMINISTIC, cuda, every_op, moved, on


def results(op, inputs, backend):
    """Outputs and gradients by name."""
    outputs = op.call(inputs, backend)
    found = {f'output {i}': x for i, x in enumerate(outputs)}
    return found | gradients(outputs, inputs)


def assert_same_bits(got, want):
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@every_op
@on()
def test_numbers(op, backend):
    inputs = moved(op.inputs(), torch.float32)
    got = results(op, inputs, backend)
    want = results(op, as_double(inputs), 'reference')
    errors = {name: relative_error(x, want[name]) for name, x in got.items()}
    assert max(errors.values()) < 2e-5, errors


@every_op
@on(DETERMINISTIC)
def test_same_bits_run_after_run(op, backend):
    """With and without torch's deterministic mode."""
    inputs = moved(op.inputs(), torch.float32)
    want = results(op, inputs, backend)
    for mode in (True, False, False, False):
        torch.use_deterministic_algorithms(mode)
        # Other memory, with other things in it.
        keep = torch.randn(12345, device=inputs[next(iter(inputs))].device)
        assert_same_bits(results(op, inputs, backend), want)
        del keep


def forward_and_backward(op, inputs, backend):
    outputs = op.call(inputs, backend)
    loss = sum(x.float().square().sum() for x in outputs)
    return *outputs, *torch.autograd.grad(loss, list(inputs.values()))


@cuda
@every_op
@on()
def test_waits_for_nothing(op, backend):
    inputs = moved(op.inputs(), torch.float32)
    # Kernels are compiled, tables are read: once.
    forward_and_backward(op, inputs, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        forward_and_backward(op, inputs, backend)
        with torch.no_grad():
            op.call(inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@cuda
@every_op
@on(DETERMINISTIC)
def test_cuda_graph(op, backend):
    inputs = moved(op.inputs(), torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_and_backward(op, inputs, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(op, inputs, backend)
    # New values in the same places.
    with torch.no_grad():
        for x in inputs.values():
            x.mul_(0.75)
    graph.replay()
    want = forward_and_backward(op, inputs, backend)
    for got, x in zip(captured, want):
        assert torch.equal(got, x)


@every_op
@on()
def test_compiled(op, backend):
    """Without a break in the graph, forward and backward."""
    inputs = moved(op.inputs(), torch.float32)
    compiled = torch.compile(
        lambda inputs: op.call(inputs, backend), fullgraph=True, backend='aot_eager'
    )
    outputs = compiled(inputs)
    got = {f'output {i}': x for i, x in enumerate(outputs)}
    got |= gradients(outputs, inputs)
    want = results(op, inputs, backend)
    for name, x in want.items():
        assert relative_error(got[name], x) < 1e-6, name


@every_op
@on(DETERMINISTIC)
def test_on_a_stream_of_the_callers(op, backend):
    inputs = moved(op.inputs(), torch.float32)
    want = results(op, inputs, backend)
    context = contextlib.nullcontext()
    if CUDA:
        torch.cuda.synchronize()
        context = torch.cuda.stream(torch.cuda.Stream())
    with context:
        got = results(op, inputs, backend)
    if CUDA:
        torch.cuda.synchronize()
    assert_same_bits(got, want)


@cuda
@every_op
@on(DETERMINISTIC)
def test_on_another_gpu_than_the_current_one(op, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    want = results(op, moved(op.inputs(), torch.float32), backend)
    inputs = {
        name: x.detach().to('cuda:1').requires_grad_()
        for name, x in moved(op.inputs(), torch.float32).items()
    }
    got = results(op, inputs, backend)
    for name, x in want.items():
        assert relative_error(got[name].to(x.device), x) < 1e-6, name
