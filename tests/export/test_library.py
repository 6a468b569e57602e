"""Our kernels inside of onnxruntime: what they compute, their threads, their errors."""

import ctypes
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import mmvssm
from compare import relative_error
from mmvssm import ops
from mmvssm.export.onnx_model import build_proto
from mmvssm.export.wrappers import wrap
from mmvssm.ops.cpu import library
from ops.attention_inputs import make_inputs as attention_inputs
from ops.attention_inputs import make_tables
from ops.backends_under_test import every_isa, on_backends
from ops.bidirectional_inputs import call as bidirectional_scan
from ops.bidirectional_inputs import make_inputs as bidirectional_inputs
from ops.scan_inputs import scan_inputs, ss2d_inputs

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
from onnx import TensorProto, helper  # noqa: E402  they may be missing

from .models import classifier  # noqa: E402

RUNNER = Path(__file__).with_name('in_onnxruntime.py')
THREADS = (1, 2, 3)
OPSETS = [helper.make_opsetid('', 18), helper.make_opsetid('mmvssm', 1)]


def run_all(folder, isa=None, threads=THREADS):
    """Run all files of a folder in a process without torch."""
    env = {name: v for name, v in os.environ.items() if name != 'PYTHONPATH'}
    if isa is not None:
        env[library.ISA_VARIABLE] = isa
    command = [sys.executable, RUNNER, folder, mmvssm.onnx_library(), *threads]
    subprocess.run([str(word) for word in command], env=env, check=True, timeout=120)


def write(folder, name, nodes, inputs, outputs, functions=()):
    """Write a model, and what it shall run on."""
    inputs = {key: np.ascontiguousarray(x) for key, x in inputs.items()}
    graph = helper.make_graph(
        nodes,
        'graph',
        [
            helper.make_tensor_value_info(
                key, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape
            )
            for key, x in inputs.items()
        ],
        [
            helper.make_tensor_value_info(key, TensorProto.FLOAT, None)
            for key in outputs
        ],
    )
    model = helper.make_model(
        graph, opset_imports=OPSETS, ir_version=10, functions=list(functions)
    )
    onnx.save(model, folder / f'{name}.onnx')
    np.savez(folder / f'{name}.npz', **inputs)


def write_op(folder, name, op, inputs, outputs, **attributes):
    """Write one node of our domain; inputs that are None are absent."""
    keys = [key if x is not None else '' for key, x in inputs.items()]
    while not keys[-1]:
        keys.pop()
    node = helper.make_node(op, keys, outputs, domain='mmvssm', **attributes)
    there = {key: x for key, x in inputs.items() if x is not None}
    write(folder, name, [node], there, outputs)


def arrays(inputs):
    return {key: None if x is None else x.detach().numpy() for key, x in inputs.items()}


# The ops, each as (its node, what torch computes). Sums of products have other bits
# than in torch, all else the same.


def ss2d(batch, channels, height, width, rank, states):
    sizes = (batch, channels, height, width, rank, states)
    inputs = ss2d_inputs(*sizes, dtype=torch.float32)
    y = ops.ss2d_scan(**inputs, backend='cpu').permute(0, 2, 3, 1)
    inputs['x'] = inputs['x'].permute(0, 2, 3, 1)
    return ('SS2DScan', arrays(inputs), {}), {'y': y}, 1e-6


def bidirectional(batch, channels, length, rank, states, width, average):
    sizes = (batch, channels, length, rank, states, width)
    inputs = bidirectional_inputs(*sizes, dtype=torch.float32)
    y = bidirectional_scan(inputs, average=average, backend='cpu').mT
    # Long sequences forget where they began: nothing is small by chance.
    inputs |= {name: inputs[name].mT for name in 'xz'}
    attributes = dict(average=int(average))
    return ('BidirectionalScan', arrays(inputs), attributes), {'y': y}, 1e-6


def selective(batch, channels, length, states, groups, optional, softplus, last=True):
    inputs = scan_inputs(
        *(batch, channels, length, states, groups),
        optional=optional,
        dtype=torch.float32,
    )
    if not softplus:
        inputs['delta'] = inputs['delta'].abs()
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
    inputs = {name: inputs.get(name) for name in names}
    found = ops.selective_scan(
        **inputs, delta_softplus=softplus, return_last_state=True, backend='cpu'
    )
    outputs = dict(zip(('out', 'last_state')[: 1 + last], found))
    attributes = dict(delta_softplus=1) if softplus else {}
    return ('SelectiveScan', arrays(inputs), attributes), outputs, 0


def attention(batch, length, heads, keys, values, rotary, normalise, eps=1e-6):
    inputs = attention_inputs(batch, length, heads, keys, values)
    tables = make_tables(inputs) if rotary else None
    options = dict(normalise=normalise, eps=eps)
    y = ops.linear_attention(**inputs, heads=heads, rotary=tables, **options)
    if rotary:
        inputs |= dict(zip(('cos', 'sin'), tables))
    attributes = dict(heads=heads, normalise=int(normalise), eps=eps)
    return ('LinearAttention', arrays(inputs), attributes), {'y': y}, 0


def norm(*shape, residual, eps=1e-5, stream=True):
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, *shape, generator=generator)
    weight = torch.rand(shape[-1], generator=generator)
    inputs = dict(x=x, weight=weight, residual=other if residual else None)
    found = ops.add_rms_norm(**inputs, eps=eps, backend='cpu')
    outputs = dict(zip(('y', 'stream')[: 1 + stream], found))
    return ('AddRMSNorm', arrays(inputs), dict(eps=eps)), outputs, 0


CASES = {
    'ss2d one state': lambda: ss2d(1, 33, 7, 5, 3, 1),
    'ss2d 16 states': lambda: ss2d(3, 20, 3, 14, 2, 16),
    'ss2d many channels': lambda: ss2d(1, 150, 9, 4, 10, 1),
    'ss2d one place': lambda: ss2d(1, 3, 1, 1, 1, 1),
    'bidirectional': lambda: bidirectional(1, 33, 70, 3, 16, 4, False),
    'bidirectional mean': lambda: bidirectional(3, 130, 41, 9, 1, 4, True),
    'bidirectional one position': lambda: bidirectional(1, 5, 1, 2, 3, 2, False),
    'selective all': lambda: selective(3, 36, 35, 16, 3, ('D', 'z', 'delta_bias'), 1),
    'selective least': lambda: selective(1, 33, 70, 1, 1, (), False, last=False),
    'selective gate': lambda: selective(2, 17, 5, 3, 1, ('z',), True),
    'attention rotary': lambda: attention(3, 35, 2, 20, 12, True, True),
    'attention long': lambda: attention(1, 700, 3, 33, None, False, True, 1e-2),
    'attention sums': lambda: attention(1, 9, 1, 6, None, True, False),
    'norm': lambda: norm(3, 35, 33, residual=True),
    'norm first': lambda: norm(40, 64, residual=False, eps=1e-2, stream=False),
    'norm vector': lambda: norm(7, residual=True),
}


@pytest.fixture(scope='module', params=every_isa())
def results(request, tmp_path_factory):
    """Folder of what the nodes compute; name of the case -> what torch computes."""
    folder = tmp_path_factory.mktemp(request.param)
    expected = {}
    with library.use_isa(request.param), torch.no_grad():
        for name, case in CASES.items():
            (op, inputs, attributes), outputs, bound = case()
            write_op(folder, name, op, inputs, list(outputs), **attributes)
            expected[name] = outputs, bound
    run_all(folder, request.param)
    return folder, expected


def outputs_of(folder, name):
    """Outputs of a model, which do not depend on the number of threads."""
    by_threads = []
    for threads in THREADS:
        message = folder / f'{name}.{threads}.txt'
        assert not message.exists(), message.read_text()
        with np.load(folder / f'{name}.{threads}.npz') as found:
            by_threads.append({key: torch.from_numpy(found[key]) for key in found})
    for other in by_threads[1:]:
        assert other.keys() == by_threads[0].keys()
        for key, x in other.items():
            assert torch.equal(x, by_threads[0][key]), f'{key} depends on the threads'
    return by_threads[0]


@pytest.mark.parametrize('name', CASES)
def test_op(results, name):
    folder, expected = results
    found = outputs_of(folder, name)
    wanted, bound = expected[name]
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        if bound:
            assert relative_error(found[key], x) < bound
        else:
            assert torch.equal(found[key], x)


# A file as it is exported has standard operators, and a function for each op.


def norm_function(body):
    """A function for AddRMSNorm without a residual stream."""
    nodes = [helper.make_node(*body), helper.make_node('Identity', ['x'], ['stream'])]
    return helper.make_function(
        *('mmvssm', 'AddRMSNorm', ['x', 'weight'], ['y', 'stream'], nodes, OPSETS[:1]),
        attributes=['eps'],
    )


@on_backends('cpu')
def test_library_comes_before_the_function_of_the_file(backend, tmp_path):
    """This function is wrong, so that one sees what has run."""
    x, weight = torch.randn(2, 5, 8), torch.rand(8)
    nodes = [
        helper.make_node('Neg', ['x'], ['negative']),
        helper.make_node(
            *('AddRMSNorm', ['negative', 'weight'], ['y', 'stream']),
            domain='mmvssm',
            eps=1e-5,
        ),
        helper.make_node('Neg', ['y'], ['back']),
    ]
    inputs = arrays(dict(x=x, weight=weight))
    function = norm_function(('Sub', ['x', 'x'], ['y']))
    write(tmp_path, 'model', nodes, inputs, ['back'], [function])
    run_all(tmp_path)
    y, _ = ops.add_rms_norm(x, weight, eps=1e-5, backend='cpu')
    assert torch.equal(outputs_of(tmp_path, 'model')['back'], y)
    alone = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    assert not alone.run(None, inputs)[0].any()


@on_backends('cpu')
@pytest.mark.parametrize(
    'name, nodes',
    [('vmamba', {'SS2DScan': 4}), ('vim', {'BidirectionalScan': 2, 'AddRMSNorm': 2})],
)
def test_exported_model(backend, name, nodes, tmp_path):
    pytest.importorskip('onnxscript')
    module = wrap(classifier(name))
    model = build_proto(module, (64, 96), ['batch'], 'function').proto
    file, optimised = (str(tmp_path / f'{word}.onnx') for word in ('model', 'run'))
    onnx.save(model, file)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(mmvssm.onnx_library())
    options.optimized_model_filepath = optimised
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options)
    # The nodes that no function has taken the place of.
    found = [n.op_type for n in onnx.load(optimised).graph.node if n.domain == 'mmvssm']
    assert Counter(found) == nodes
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {'image': images.numpy()})
    with torch.inference_mode():
        (wanted,) = module(images)
        assert relative_error(torch.from_numpy(found), wanted) < 2e-6


# What is wrong with a file or its inputs is said in one sentence.


def wrong(case, **changed):
    (op, inputs, attributes), outputs, _ = CASES[case]()
    for name, change in changed.items():
        if name in inputs:
            inputs[name] = None if change is None else change(inputs[name])
        else:
            attributes[name] = change
    return op, inputs, attributes, list(outputs)


def shorter(x):
    return x[..., :-1]


def flat(x):
    return x.reshape(-1)


def empty(x):
    return x[:0]


WRONG = {
    'SS2DScan: x must be (batch, height, width, channels) with no empty side, got '
    '(1155,)': lambda: wrong('ss2d one state', x=flat),
    'SS2DScan: x must be (batch, height, width, channels) with no empty side, got '
    '(0, 7, 5, 33)': lambda: wrong('ss2d one state', x=empty),
    'SS2DScan: x_proj_weight must be (4, 5, 33), got (4, 5, 32)': lambda: wrong(
        'ss2d one state', x_proj_weight=shorter
    ),
    'SS2DScan: Ds must be (132,), got (131,)': lambda: wrong(
        'ss2d one state', Ds=shorter
    ),
    'SS2DScan: dt_projs_bias must be (4, 33), got (0, 33)': lambda: wrong(
        'ss2d one state', dt_projs_bias=empty
    ),
    'SelectiveScan: z must be (3, 36, 35), got (0, 36, 35)': lambda: wrong(
        'selective all', z=empty
    ),
    'BidirectionalScan: z must be (1, 70, 33), got (1, 70, 32)': lambda: wrong(
        'bidirectional', z=shorter
    ),
    'BidirectionalScan: backward.conv_weight must be (33, 4), got (33, 3)': (
        lambda: wrong('bidirectional', **{'backward.conv_weight': shorter})
    ),
    'BidirectionalScan: backward.A must be (33, 16), got (33, 15)': lambda: wrong(
        'bidirectional', **{'backward.A': shorter}
    ),
    'SelectiveScan: delta must be (3, 36, 35), got (3, 36, 34)': lambda: wrong(
        'selective all', delta=shorter
    ),
    'SelectiveScan: the 3 groups of B and C do not divide the 35 channels': (
        lambda: wrong('selective all', u=lambda x: x[:, 1:])
    ),
    'SelectiveScan: delta_bias must be (36,), got (35,)': lambda: wrong(
        'selective all', delta_bias=shorter
    ),
    'LinearAttention: 3 heads do not fit 40 channels of q and k and 24 of v': (
        lambda: wrong('attention rotary', heads=3)
    ),
    'LinearAttention: cos and sin must be given together': lambda: wrong(
        'attention rotary', sin=None
    ),
    'LinearAttention: cos must be (35, 20), got (35, 19)': lambda: wrong(
        'attention rotary', cos=shorter
    ),
    'AddRMSNorm: weight must be (33,), got (32,)': lambda: wrong(
        'norm', weight=shorter
    ),
    'AddRMSNorm: x must be (..., channels) with no empty side, got (0, 35, 33)': (
        lambda: wrong('norm', x=empty)
    ),
    'AddRMSNorm) in node () is invalid': lambda: wrong('norm', x=np.float64),
    'SS2DScan) in node () is invalid': lambda: wrong('ss2d one state', A=np.float16),
}


@pytest.fixture(scope='module')
def messages(tmp_path_factory):
    """Folder of the errors, in the order of ``WRONG``."""
    folder = tmp_path_factory.mktemp('wrong')
    for number, make in enumerate(WRONG.values()):
        op, inputs, attributes, outputs = make()
        write_op(folder, str(number), op, inputs, outputs, **attributes)
    run_all(folder, threads=[1])
    return folder


@on_backends('cpu')
@pytest.mark.parametrize('number', range(len(WRONG)), ids=list(WRONG))
def test_wrong_inputs(backend, number, messages):
    message = (messages / f'{number}.1.txt').read_text()
    assert message.count(list(WRONG)[number]) == 1


@on_backends('cpu')
def test_nan_is_no_error(backend, tmp_path):
    """NaN comes out where it depends on NaN that went in, as of other operators."""
    (op, inputs, _), outputs, _ = CASES['ss2d one state']()
    x = np.concatenate([inputs['x'], inputs['x']])
    x[0, 2, 3, 4] = np.nan
    write_op(tmp_path, 'model', op, inputs | {'x': x}, list(outputs))
    run_all(tmp_path)
    with np.load(tmp_path / 'model.1.npz') as found:
        first, second = map(torch.from_numpy, found['y'])
    assert first[2, 3].isnan().all()
    assert relative_error(second, outputs['y'][0]) < 1e-6


# What is wrong with the library.


@on_backends('cpu')
def test_unknown_instruction_set(backend, tmp_path):
    (op, inputs, attributes), outputs, _ = CASES['norm vector']()
    write_op(tmp_path, 'model', op, inputs, list(outputs), **attributes)
    run_all(tmp_path, 'mmx', threads=[1])
    message = (tmp_path / 'model.1.txt').read_text()
    assert 'MMVSSM_CPU_ISA names an instruction set that' in message


@on_backends('cpu')
def test_onnxruntime_that_is_too_old(backend):
    """Its table of functions is shorter than ours; it has version 1 of it."""
    found = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code, message):
        found.append(message.decode())
        return id(found)

    table = ctypes.pointer(create_status)
    asked = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version):
        asked.append(version)
        return ctypes.addressof(table.contents) if version == 1 else None

    version = ctypes.create_string_buffer(b'1.16.3')

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def get_version_string():
        return ctypes.addressof(version)

    base = (ctypes.c_void_p * 2)(
        *(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version_string))
    )
    register = ctypes.CDLL(mmvssm.onnx_library()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    register.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    assert register(None, ctypes.addressof(base)) == id(found)
    assert asked == [17, 1]
    assert found == [
        'the kernels of mmvssm need onnxruntime 1.17 or newer, this is 1.16.3'
    ]


def test_kernels_that_were_not_compiled(monkeypatch, tmp_path):
    def forget():
        library._library.cache_clear()
        library._default_isa.cache_clear()

    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library, '__file__', str(tmp_path / 'library.py'))
    forget()
    try:
        with pytest.raises(ops.BackendUnavailableError) as error:
            mmvssm.onnx_library()
    finally:
        monkeypatch.undo()
        forget()
    assert "onnxruntime cannot use mmvssm's compiled kernels: it was not" in str(
        error.value
    )
