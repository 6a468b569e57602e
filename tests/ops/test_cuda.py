"""The CUDA backend without a GPU: run on the CPU, and compiled but not run."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mmvssm.ops import (
    BackendUnavailableError,
    backend_status,
    choose_backend,
    selective_scan,
)
from mmvssm.ops.cache import CACHE_VARIABLE
from mmvssm.ops.cuda import build, library

from .scan_inputs import scan_inputs

HERE = Path(__file__).parent
CPU_FLAGS = ('-std=c++17', '-O1', '-fPIC', '-shared', '-Wno-unknown-pragmas')
# Says its version, writes down its arguments, leaves a copy of itself.
FAKE_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo 'release 13.0, V13.0.88'; exit; fi
echo "$*" >> {log}
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then cp "$0" "$2"; fi
    shift
done
"""


@pytest.fixture(scope='module')
def library_for_the_cpu(tmp_path_factory):
    """The kernels compiled as C++ with CUDA emulated."""
    compiler = shutil.which('c++') or shutil.which('g++')
    if compiler is None or not sys.platform.startswith('linux'):
        pytest.skip('needs a C++ compiler on Linux')
    path = tmp_path_factory.mktemp('cuda') / 'kernels.so'
    folder = Path(build.__file__).parent
    subprocess.run(
        [compiler, *CPU_FLAGS, f'-I{HERE / "cuda_emulation"}']
        + [f'-DMMVSSM_DIGEST={build.digest()}', '-x', 'c++']
        + [*(str(folder / name) for name in build.SOURCES), '-o', str(path)],
        check=True,
    )
    return path


@pytest.mark.parametrize(
    'tests',
    [
        'cuda_on_cpu.py',
        ('test_selective_scan.py', 'test_ss2d_scan.py', 'test_scan_orders.py'),
    ],
)
def test_on_the_cpu(library_for_the_cpu, tests):
    """Numbers and gradients, and what all backends for the CPU are tested for."""
    files, chosen = [tests], []
    if isinstance(tests, tuple):
        files, chosen = tests, ['-k', 'cuda']
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *chosen]
        + [str(HERE / name) for name in files],
        cwd=HERE.parents[1],
        env=os.environ
        | {
            'MMVSSM_TEST_CUDA_ON_CPU': '1',
            library.LIBRARY_VARIABLE: str(library_for_the_cpu),
            'OMP_NUM_THREADS': '1',
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed, _, _ = done.stdout.strip().splitlines()[-1].partition(' passed')
    assert int(passed) > 50


@pytest.fixture(scope='module')
def nvcc():
    try:
        return build.find_nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_compiles_without_spilling(nvcc, tmp_path):
    """For all GPUs that an installation builds for; the library can be loaded."""
    path = tmp_path / 'kernels.so'
    report = build.compile_library(
        path, nvcc, build.ARCHITECTURES, ('-Xptxas', '-v', '--threads', '1')
    )
    kernels = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack.*?"
        r'(\d+) bytes spill stores.*?Used (\d+) registers',
        report,
        re.DOTALL,
    )
    spilling = []
    for name, architecture, stack, spilled, registers in kernels:
        name = re.sub(r'^_ZN6mmvssm\d+|EEvNS_.*', '', name)
        print(
            f'sm_{architecture} {name}: {registers} registers, {stack} bytes of stack'
        )
        if int(stack) or int(spilled):
            spilling.append(f'{name} for sm_{architecture}')
    assert {architecture for _, architecture, *_ in kernels} == {*build.ARCHITECTURES}
    assert len(kernels) > 30 * len(build.ARCHITECTURES)
    assert not spilling
    loaded = library._load(str(path))
    if not torch.cuda.is_available():
        problem = library.ScanProblem(states=1, tile=32, stretches=1)
        status = loaded.mmvssm_scan_forward(ctypes.byref(problem), None)
        assert status and loaded.mmvssm_cuda_error(status)


# Finding a library, or compiling it


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine with a GPU, where nothing is compiled or looked up yet."""
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
    monkeypatch.setattr(library, '_failure', [])
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    monkeypatch.setattr(library, '_installed', lambda: tmp_path / 'none.so')
    caches = (library._machine_lacks, library._load, library._library)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def fake_nvcc(fresh, monkeypatch):
    """The file where each of its compilations leaves a line."""
    compiler, log = fresh / 'nvcc', fresh / 'log'
    compiler.write_text(FAKE_NVCC.format(log=log))
    compiler.chmod(0o755)
    log.write_text('')
    monkeypatch.setenv('CUDACXX', str(compiler))
    return log


def test_nothing_is_compiled_to_say_that_it_can_run(fake_nvcc):
    assert backend_status()['cuda'] is None
    assert fake_nvcc.read_text() == ''


def test_first_use_compiles_for_this_gpu(fake_nvcc, fresh):
    path = library._compiled()
    assert path.parent == fresh / 'cache'
    assert path.name == f'cuda-{build.digest()}-13.0.88-sm_90.so'
    (command,) = fake_nvcc.read_text().splitlines()
    assert re.findall('-gencode=(.*?) ', command) == ['arch=compute_90,code=sm_90']
    assert library._compiled() == path
    assert len(fake_nvcc.read_text().splitlines()) == 1
    # The library came into the folder whole, by its name alone.
    names = {entry.name for entry in path.parent.iterdir()}
    assert names == {path.name, path.with_suffix('.lock').name}


def test_one_of_several_compiles(fake_nvcc):
    threads = [threading.Thread(target=library._compiled) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_nvcc.read_text().splitlines()) == 1


def test_other_sources_are_another_library(fake_nvcc, monkeypatch, tmp_path):
    first = library._compiled()
    folder = tmp_path / 'sources'
    shutil.copytree(build._FOLDER, folder, ignore=shutil.ignore_patterns('*.py*'))
    monkeypatch.setattr(build, '_FOLDER', folder)
    assert library._compiled() == first
    with (folder / 'problem.h').open('a') as header:
        header.write('// More.\n')
    assert library._compiled() != first


def test_installation_builds_for_every_gpu(fake_nvcc, tmp_path):
    build.compile_library(tmp_path / 'a.so', build.find_nvcc(), build.ARCHITECTURES)
    codes = re.findall(',code=(.*?) ', fake_nvcc.read_text())
    assert codes == ['sm_80', 'sm_90', 'sm_100', 'compute_100']


def test_failing_compilation(fake_nvcc, fresh):
    """The reason is one line, and nothing is tried again."""
    (fresh / 'nvcc').write_text(
        '#!/bin/sh\necho "*$1" >> ' + str(fake_nvcc) + '\necho V13.0\n'
        'test $1 = --version || { echo "a.cu(1): error: no such thing"; exit 1; }\n'
    )
    with pytest.raises(RuntimeError, match="'cuda' cannot run.*no such thing$"):
        library.tile('scan_forward', 1, 1)
    tries = fake_nvcc.read_text()
    reason = backend_status()['cuda']
    assert reason.endswith('failed: a.cu(1): error: no such thing')
    assert fake_nvcc.read_text() == tries
    assert [path.suffix for path in (fresh / 'cache').iterdir()] == ['.lock']


def test_library_that_is_none(fake_nvcc, fresh):
    """What the compiler left cannot be loaded."""
    with pytest.raises(RuntimeError, match="'cuda' cannot run: .*/cache/cuda-"):
        library.tile('scan_forward', 1, 1)
    assert '/cache/cuda-' in backend_status()['cuda']


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv('CUDACXX', '/nowhere/nvcc')
    assert backend_status()['cuda'] == "CUDACXX is '/nowhere/nvcc', which is no program"
    library._machine_lacks.cache_clear()
    monkeypatch.delenv('CUDACXX')
    monkeypatch.setattr(shutil, 'which', lambda _: None)
    assert 'there is no nvcc' in backend_status()['cuda']


def test_no_gpu(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'sees no CUDA device' in backend_status()['cuda']


def test_rocm(fresh, monkeypatch):
    """Its tensors are on devices of the type 'cuda', too."""
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    reason = "AMD GPUs (ROCm) are served by the backend 'torch'"
    assert backend_status()['cuda'] == reason
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run: AMD GPUs"):
        choose_backend('cuda', torch.float32, 'cuda')
    assert choose_backend('cuda', torch.float32) == 'torch'


def test_old_gpu(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (7, 5))
    reason = 'the GPU has compute capability 7.5, it takes 8.0 and later'
    assert backend_status()['cuda'] == reason


def test_newest_gpu_needs_no_new_number(fake_nvcc, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (12, 1))
    assert backend_status()['cuda'] is None
    assert library._compiled().name.endswith('sm_121.so')


def test_named_library(fresh, monkeypatch, library_for_the_cpu):
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(library_for_the_cpu))
    assert backend_status()['cuda'] is None
    tiles = [(1, 384, 128), (1, 192, 96), (16, 300, 64), (16, 3, 32), (200, 3, 3)]
    for states, channels, tile in tiles:
        assert library.tile('scan_forward', states, channels) == tile
    for states, channels, tile in [(1, 384, 128), (16, 192, 32), (16, 20, 24)]:
        assert library.tile('scan_backward', states, channels) == tile


def test_installed_library_is_taken(fresh, monkeypatch, library_for_the_cpu):
    monkeypatch.setattr(library, '_installed', lambda: library_for_the_cpu)
    monkeypatch.setenv('CUDACXX', '/nowhere/nvcc')
    assert backend_status()['cuda'] is None
    assert library._library()._name == str(library_for_the_cpu)


def test_library_of_another_version(fresh, monkeypatch):
    monkeypatch.setenv(library.LIBRARY_VARIABLE, ctypes.util.find_library('c'))
    assert 'built from the sources of another version' in backend_status()['cuda']


def test_library_with_other_structures(fresh, monkeypatch, library_for_the_cpu):
    """Structures of another size would be read as garbage."""

    class Longer(library.ScanProblem):
        _fields_ = [('more', ctypes.c_int64)]

    monkeypatch.setattr(library, 'ScanProblem', Longer)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(library_for_the_cpu))
    assert 'built from the sources of another version' in backend_status()['cuda']


def test_cpu_tensors_are_refused():
    inputs = scan_inputs(1, 2, 3, 1, dtype=torch.float32, requires_grad=False)
    with pytest.raises(BackendUnavailableError, match='cuda tensors, not cpu'):
        selective_scan(**inputs, backend='cuda')
