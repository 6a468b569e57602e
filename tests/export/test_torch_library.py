"""Ops without Python: the library itself, and packages of AOTInductor in C++."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compare import relative_error
from families import FAMILIES
from mmvssm.export import ExportError, to_exported_program, torch_library
from mmvssm.ops import linear_attention, selective_scan
from mmvssm.ops.cpu import library
from ops.backends_under_test import on_backends
from ops.ops_under_test import LONG, SMALL, Case

needs_compiler = pytest.mark.skipif(
    sys.platform != 'linux' or shutil.which(os.environ.get('CXX') or 'g++') is None,
    reason='there is no C++ compiler',
)
compiled = on_backends('cpu')
DOCS = Path(__file__).parents[2] / 'docs' / 'export.md'


@pytest.fixture(scope='module')
def deployed(tmp_path_factory):
    """The library and the kernels, in a folder that has nothing else."""
    made = torch_library(tmp_path_factory.mktemp('made'))
    folder = tmp_path_factory.mktemp('elsewhere')
    for file in Path(made).parent.iterdir():
        shutil.move(file, folder)
    return folder / Path(made).name


def run_elsewhere(deployed, tmp_path, calls, **env):
    """What calls of ops give in a process without mmvssm."""
    file = tmp_path / 'calls.pt'
    torch.save(calls, file)
    script = Path(__file__).with_name('ops_without_mmvssm.py')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | env
    command = [sys.executable, '-I', script, file, deployed]
    subprocess.run(list(map(str, command)), env=env, check=True, timeout=120)
    return torch.load(file)


def cases():
    """Calls of every op: odd sizes, a map's worth, and options that are left out."""
    for make, sizes in SMALL.items():
        yield make(*sizes, dtype=torch.float32)
        yield make(*LONG[make][0], dtype=torch.float32)
    scan = SMALL[next(iter(SMALL))]
    inputs = next(iter(SMALL))(*scan, dtype=torch.float32).inputs
    few = {name: inputs[name] for name in ('u', 'delta', 'A', 'B', 'C')}
    yield Case(few, lambda x, **k: (selective_scan(**x, **k),), selective_scan)
    q = torch.randn(2, 9, 8)
    yield Case(
        dict(q=q, k=q + 1, v=torch.randn(2, 9, 4).mT.contiguous().mT),
        lambda x, **k: (linear_attention(**x, heads=2, normalise=False, **k),),
        linear_attention,
    )


@needs_compiler
@compiled
def test_ops(backend, deployed, tmp_path):
    """The same numbers as in Python, in tensors of the same strides."""
    calls, wants = [], []
    with torch.no_grad():
        for case in cases():
            arguments = [
                x.detach() if isinstance(x, torch.Tensor) else x
                for x in case.arguments(backend, keep=False)
            ]
            calls.append((case.op.name, arguments))
            found = case.op.torch_op(*arguments)
            wants.append((found,) if isinstance(found, torch.Tensor) else found)
    gots = run_elsewhere(deployed, tmp_path, calls)
    for (name, _), got, want in zip(calls, gots, wants, strict=True):
        assert not isinstance(got, str), got
        got = (got,) if isinstance(got, torch.Tensor) else got
        assert len(got) == len(want), name
        for a, b in zip(got, want):
            # Products are those of another library.
            assert a.stride() == b.stride() and relative_error(a, b) < 2e-6, name


@needs_compiler
@compiled
def test_what_it_refuses(backend, deployed, tmp_path):
    by_name = {
        make.__name__: make(*sizes, dtype=torch.float32)
        for make, sizes in SMALL.items()
    }

    def call(name, keep=False, change=lambda x: x):
        arguments = by_name[name].arguments(backend, keep)
        return name, [
            change(x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments
        ]

    order = call('ss2d_scan')
    order[1][order[1].index('cross')] = 'hilbert'
    calls = [
        call('linear', keep=True),
        call('add_rms_norm', change=torch.Tensor.double),
        order,
        call('add_rms_norm'),
    ]
    kept, double, other, isa = run_elsewhere(
        deployed, tmp_path, calls, MMVSSM_CPU_ISA='sse'
    )
    assert 'exported for training' in kept
    assert 'takes float32 on the CPU' in double
    assert "'cross' only, not 'hilbert'" in other
    assert 'MMVSSM_CPU_ISA=sse is no instruction set' in isa


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(library, 'unavailable', lambda: None)
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(ExportError, match='no-such-compiler, which is not there'):
        torch_library(tmp_path)
    monkeypatch.setattr(library, 'unavailable', lambda: 'it was not compiled')
    with pytest.raises(ExportError, match='kernels cannot be used: it was not'):
        torch_library(tmp_path)


@needs_compiler
@compiled
@pytest.mark.long
def test_packages_in_a_program_without_python(backend, deployed, tmp_path):
    """The program and the command of the documentation, with a model of each family."""
    text = DOCS.read_text()
    (source,) = re.findall(r'```cpp\n(.*?)```', text, re.S)
    assert len(source.splitlines()) <= 60
    (tmp_path / 'run_package.cpp').write_text(source)
    (command,) = re.findall(r'```bash\n(TORCH=.*?)\./run_package', text, re.S)
    command = command.replace('python', sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=600)
    for name in ('vmamba_v05_noz', 'vim', 'mlla'):
        torch.manual_seed(0)
        net = FAMILIES[name]().eval()
        program = to_exported_program(net, 64, ('batch', 'size'))
        package = tmp_path / f'{name}.pt2'
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        for height, width in [(64, 64), (33, 47), (4, 5)]:
            image = torch.randn(1, 3, height, width)
            with torch.no_grad():
                want = torch.cat([y.flatten() for y in net(image)])
            words = [package, deployed, height, width]
            done = subprocess.run(
                [tmp_path / 'run_package', *map(str, words)],
                input=image.numpy().tobytes(),
                capture_output=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr.decode()
            got = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
            assert relative_error(got, want) < 2e-6, (name, height, width)
