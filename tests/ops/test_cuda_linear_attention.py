"""The CUDA kernels of linear attention without a GPU: emulated, and compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.ops import linear_attention
from mmvssm.ops.cuda import kernels
from mmvssm.ops.linear_attention import cuda_backend
from mmvssm.ops.linear_attention.declaration import (
    LINEAR_ATTENTION,
    AttentionInputs,
    AttentionOptions,
)

from . import ops_under_test
from .attention_inputs import make_inputs, make_tables
from .cuda_emulation import AVAILABLE, SEED_VARIABLE, Emulator
from .scan_inputs import as_double, gradients, relative_error

HERE = Path(__file__).parent
WITHOUT_VARIABLE = 'MMVSSM_EMULATION_WITHOUT'
BARRIERS = (
    *('filled', 'emptied', 'read', 'parts', 'sums'),
    *('sums put', 'gradients put'),
)
emulated = pytest.mark.skipif(not AVAILABLE, reason='there is no C++ compiler')
in_passes = pytest.mark.parametrize('passes', ['at once', 'one by one'], indirect=True)


@pytest.fixture(autouse=True)
def emulator():
    with kernels.use_machine(Emulator()):
        yield


@pytest.fixture
def passes(request, monkeypatch):
    """Whether a launch makes the sums and reads them, or one does each."""
    if request.param == 'one by one':
        monkeypatch.setattr(cuda_backend, '_SHORT', 0)


def outputs_of(inputs, rotary, backend, **options):
    """Output and gradients by name."""
    if rotary is not None:
        rotary = [x.to(torch.promote_types(x.dtype, inputs['q'].dtype)) for x in rotary]
    y = linear_attention(**inputs, rotary=rotary, backend=backend, **options)
    return {'y': y, **gradients(y, inputs)}


def assert_right(inputs, rotary, *, error=3e-6, **options):
    """Right to a relative error, and to the bits of an output of 16 bits."""
    got = outputs_of(inputs, rotary, 'cuda', **options)
    want = outputs_of(as_double(inputs), rotary, 'reference', **options)
    # Of a single position hardly anything but v matters, nor with a single channel.
    _, length, channels = inputs['q'].shape
    only_v = length == 1 or channels == options['heads']
    for name, x in want.items():
        difference = got[name].double() - x
        rounding = torch.finfo(got[name].dtype).eps
        noise = 1e-6 * want['v'].norm() if name in 'qk' and only_v else 0
        assert difference.norm() < max(error, rounding / 2) * x.norm() + noise, name
        assert not got[name].isnan().any()


@emulated
@in_passes
@pytest.mark.parametrize(
    'heads, keys, values, rotated',
    [
        *((2, 32, 32, True), (3, 8, 16, True), (1, 2, 1, True), (2, 1, 3, False)),
        *((1, 33, 5, False), (1, 64, 40, True), (2, 16, 64, True)),
    ],
)
@pytest.mark.parametrize('length', [1, 5, 49, 64, 65, 200])
def test_right(heads, keys, values, rotated, length, passes):
    inputs = make_inputs(2, length, heads, keys, values)
    rotary = make_tables(inputs) if rotated else None
    assert_right(inputs, rotary, heads=heads)


@emulated
@pytest.mark.parametrize(
    'dtype, passes',
    [
        (torch.bfloat16, 'at once'),
        (torch.bfloat16, 'one by one'),
        (torch.float16, 'at once'),
    ],
    indirect=['passes'],
)
def test_half_precision(dtype, passes):
    inputs = make_inputs(2, 200, 2, 32, dtype=dtype)
    assert_right(inputs, make_tables(inputs), heads=2)


@emulated
def test_under_autocast_everything_but_the_inputs_is_float32():
    inputs = make_inputs(1, 70, 2, 32, dtype=torch.bfloat16)
    options = dict(heads=2, rotary=make_tables(inputs))
    with torch.autocast('cpu', torch.bfloat16):
        got = linear_attention(**inputs, backend='cuda', **options)
    assert got.dtype == torch.float32
    double = as_double(inputs)
    want = linear_attention(**double, backend='reference', **options)
    assert relative_error(got, want) < 3e-6
    got, want = gradients(got, inputs), gradients(want, double)
    for name, x in want.items():
        assert got[name].dtype == torch.bfloat16
        assert relative_error(got[name], x) < 4e-3


@emulated
def test_mixed_dtypes():
    inputs = make_inputs(1, 70, 2, 32)
    for name, dtype in dict(q=torch.bfloat16, k=torch.float16).items():
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    assert_right(inputs, make_tables(inputs), heads=2)


@emulated
@in_passes
def test_without_normaliser(passes):
    inputs = make_inputs(2, 70, 2, 32)
    assert_right(inputs, make_tables(inputs), heads=2, normalise=False)


@emulated
def test_eps():
    inputs = make_inputs(1, 70, 2, 32)
    # Features near e^-12, with which eps is most of the normaliser.
    with torch.no_grad():
        inputs['q'] -= 12
    for eps in (0.0, 1e-2):
        assert_right(inputs, make_tables(inputs), heads=2, eps=eps)


@emulated
def test_any_strides():
    dense = make_inputs(2, 70, 2, 32)
    rotary = make_tables(dense)
    projection = torch.cat([dense['q'], dense['k']], 2).detach()
    q, k = projection.chunk(2, 2)
    views = dict(
        q=q,
        # One row in 17 numbers more, which no copy of 16 bytes can read.
        k=torch.nn.functional.pad(k, (0, 1))[..., :-1],
        v=dense['v'].detach().mT.contiguous().mT,
    )
    want = outputs_of(dense, rotary, 'cuda', heads=2)
    for name, x in views.items():
        inputs = dense | {name: x.detach().requires_grad_()}
        got = outputs_of(inputs, rotary, 'cuda', heads=2)
        for key, value in want.items():
            assert relative_error(got[key], value) < 1e-6, key
    # One batch element for both.
    inputs = {name: x.detach()[:1].expand(2, -1, -1) for name, x in dense.items()}
    both = linear_attention(**inputs, heads=2, rotary=rotary, backend='cuda')
    torch.testing.assert_close(both[0], want['y'][0], rtol=0, atol=0)
    torch.testing.assert_close(both[1], want['y'][0], rtol=0, atol=0)


@emulated
def test_gradients_of_a_projection_are_not_copied():
    q, k = torch.randn(1, 5, 32).chunk(2, 2)
    inputs = AttentionInputs(q, k, torch.randn(1, 5, 16))
    options = AttentionOptions(1, True, 1e-6, torch.float32, torch.float32)
    y, saved = LINEAR_ATTENTION.torch_op(*inputs, *options, True, 'cuda')
    wanted = [True, True, True, False, False]
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Ops():
        LINEAR_ATTENTION.backward(y, *inputs, saved, wanted, *options, 'cuda')
    assert not [name for name in seen if 'copy' in name or 'clone' in name]


@emulated
@in_passes
def test_nan_stays_where_it_belongs(passes):
    inputs = make_inputs(2, 70, 2, 32)
    with torch.no_grad():
        inputs['q'][0, 3, 1] = float('nan')
        inputs['k'][1, 69, 40] = float('nan')
    y = linear_attention(**inputs, heads=2, backend='cuda')
    found = y.isnan()
    want = torch.zeros_like(found)
    want[0, 3, :32] = True
    want[1, :, 32:] = True
    assert torch.equal(found, want)


@emulated
@pytest.mark.parametrize('strides', [(2**31, 8, 1), (8, 2**30, 1)])
def test_far_apart_in_memory(strides):
    """Beyond 2^31 numbers or bytes, most of which are never touched."""
    dense = make_inputs(2, 2, 1, 8, dtype=torch.bfloat16)
    want = linear_attention(**dense, backend='cuda')
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    for name, x in dense.items():
        far = memory.as_strided(x.shape, strides)
        far.copy_(x.detach())
        got = linear_attention(**(dense | {name: far}), backend='cuda')
        assert torch.equal(got, want), name


@emulated
def test_what_it_refuses():
    wide = make_inputs(1, 5, 1, 65)
    torch.testing.assert_close(
        linear_attention(**wide, backend='cuda'),
        linear_attention(**wide, backend='torch'),
    )
    double = make_inputs(1, 5, 1, 4)
    double['v'] = double['v'].double()
    assert linear_attention(**double, backend='cuda').dtype == torch.float64
    backend = LINEAR_ATTENTION.backends['cuda']
    options = AttentionOptions(1, True, 1e-6, torch.float32, torch.float32)
    assert 'not 65' in backend.refuses(AttentionInputs(**wide), options)
    options = options._replace(dtype=torch.float64)
    assert 'float64' in backend.refuses(AttentionInputs(**double), options)


# As an op


@emulated
def test_as_an_op_of_torch():
    case = ops_under_test.linear_attention(2, 2, 3, 8, 2, dtype=torch.float32)
    opcheck(case.op.torch_op, case.arguments('cuda'))
    torch._dynamo.reset()
    names = list(case.inputs)

    def function(*tensors):
        return case.call(dict(zip(names, tensors)), backend='cuda')[0]

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    got, want = (f(*case.inputs.values()) for f in (compiled, function))
    assert torch.equal(got, want)
    got, want = gradients(got, case.inputs), gradients(want, case.inputs)
    for name in names:
        assert torch.equal(got[name], want[name]), name


@emulated
def test_gradients_of_gradients():
    inputs = make_inputs(1, 6, 2, 8)

    def second(inputs, backend):
        y = linear_attention(**inputs, heads=2, backend=backend)
        first = torch.autograd.grad(y.sin().sum(), inputs['q'], create_graph=True)[0]
        return gradients(first, inputs)

    got, want = second(inputs, 'cuda'), second(as_double(inputs), 'reference')
    for name in inputs:
        assert relative_error(got[name], want[name]) < 1e-5, name


# Orders of threads


def all_bits(whole):
    """Output and gradients, for a seed of the environment."""
    cuda_backend._SHORT = 200 if whole else 0
    inputs = make_inputs(2, 200, 1, 8, dtype=torch.bfloat16)
    found = outputs_of(inputs, make_tables(inputs), 'cuda')
    return [x.detach() for x in found.values()]


def are_equal(got, want):
    return all(map(torch.equal, got, want))


@emulated
@pytest.mark.parametrize('whole', [True, False])
def test_same_bits_in_any_order(whole, monkeypatch):
    monkeypatch.setattr(cuda_backend, '_SHORT', None)
    want = all_bits(whole)
    for seed in range(1, 20):
        monkeypatch.setenv(SEED_VARIABLE, str(seed))
        assert are_equal(all_bits(whole), want), seed


def fails_without(barrier):
    """Whether some order of threads shows that a barrier is missing."""
    want = {whole: all_bits(whole) for whole in (True, False)}
    os.environ[WITHOUT_VARIABLE] = barrier
    for seed in range(20):
        os.environ[SEED_VARIABLE] = str(seed)
        for whole in want:
            if not are_equal(all_bits(whole), want[whole]):
                return True
    return False


@emulated
def test_every_barrier_is_needed():
    names = {
        name
        for path in Path(kernels.__file__).parent.glob('linear_attention*')
        for name in re.findall(r'sync_\w+\("(.*)"\)', path.read_text())
    }
    assert names == set(BARRIERS)
    script = f"""if True:
        import os, sys, torch
        from tests.ops.test_cuda_linear_attention import *
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        for barrier in {BARRIERS}:
            child = os.fork()
            if not child:
                with kernels.use_machine(Emulator()):
                    os._exit(0 if fails_without(barrier) else 1)
            print(barrier, os.waitpid(child, 0)[1])
    """
    done = subprocess.run(
        [sys.executable, '-c', script],
        cwd=HERE.parents[1],
        env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    found = dict(line.rsplit(' ', 1) for line in done.stdout.splitlines())
    assert found.keys() == set(BARRIERS), done.stderr
    assert [name for name in BARRIERS if found[name] != '0'] == [], done.stderr


# Launches


def recorded(batch, length, heads, channels=32, dtype=torch.bfloat16):
    """What the forward and the backward pass launch on a GPU."""
    q, v = (
        torch.empty(batch, length, heads * channels, dtype=dtype, device='meta')
        for _ in 'qv'
    )
    tables = torch.empty(2, length, heads * channels // 2, device='meta').unbind()
    inputs = AttentionInputs(q, q, v, *tables)
    options = AttentionOptions(heads, True, 1e-6, torch.float32, dtype)
    backend = LINEAR_ATTENTION.backends['cuda']
    with kernels.recording() as forward:
        (y,), saved, _ = backend.forward(inputs, options, True)
    with kernels.recording() as backward:
        backend.backward(inputs, options, saved, (y,), None)
    return forward, backward


@pytest.mark.parametrize('channels', [32, 64])
@pytest.mark.parametrize('length', [1, 64, 257, 1000, 3136, 64000, 300000])
@pytest.mark.parametrize('batch', [1, 3, 128, 2000])
def test_splits(batch, length, channels):
    for launches in recorded(batch, length, 2, channels):
        for launch in launches:
            args, threads = launch.args, launch.threads
            splits = -(-args.length // args.split_length)
            tasks, rest = divmod(launch.grid, splits)
            assert rest == 0 and tasks % (2 * batch) == 0
            assert args.split_length % launch.constants['POSITIONS'] == 0
            # No more CTAs than run at once, and not half as few, if there is work.
            room = 132 * launch.constants['RESIDENT']
            if len(launches) > 1:
                assert launch.grid <= max(room, tasks)
                most = tasks * -(-length // 64)
                assert launch.grid > min(room // 3, most - 1), (threads, splits)


def test_few_launches():
    # Stages of MLLA at a batch of 128, and a large map.
    for length, heads in ((784, 4), (196, 8), (49, 16)):
        assert [len(x) for x in recorded(128, length, heads)] == [1, 1]
    assert [len(x) for x in recorded(1, 64000, 2)] == [2, 2]


@pytest.mark.parametrize('dtype, most', [(torch.bfloat16, 128), (torch.float32, 168)])
def test_registers_and_memory(dtype, most):
    """No stack, and the CTAs that are meant to be resident have room."""
    nvidia = pytest.importorskip('nvidia')
    tools = [x for p in nvidia.__path__ for x in Path(p).glob('*/bin/cuobjdump')]
    if not tools or kernels._nvrtc_path() is None:
        pytest.skip('needs nvidia-cuda-nvrtc and nvidia-cuda-cuobjdump')
    launches = {}
    for length, heads in ((49, 16), (64000, 2)):
        for launch in sum(recorded(1, length, heads, dtype=dtype), []):
            launches[launch.binary] = launch
    assert len(launches) == 6
    for launch in launches.values():
        kernel, constants = launch.kernel, launch.constants
        kernels.compiled(kernel, constants, 90)
        path = kernels._kept(kernel, constants, 'sm_90')
        usage = subprocess.run(
            [tools[0], '-res-usage', path], capture_output=True, text=True, check=True
        ).stdout
        registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
        assert stack == 0 and registers <= most
        # Of an H100: 64 K registers, 227 KiB of shared memory, of which a CTA has one.
        resident = constants['RESIDENT']
        assert resident * launch.threads * -(-registers // 8) * 8 <= 2**16
        assert resident * (launch.shared + 1024) <= 227 * 1024
        assert resident * launch.threads // 32 >= (
            16 if dtype == torch.bfloat16 else 12
        )
