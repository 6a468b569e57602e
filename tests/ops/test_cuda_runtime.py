"""How CUDA kernels are compiled, kept and launched, without a GPU."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_int32, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmvssm import collect_env
from mmvssm.ops import backend_status
from mmvssm.ops.cache import CACHE_VARIABLE
from mmvssm.ops.cuda import driver, kernels, nvrtc
from mmvssm.ops.cuda.kernels import Kernel, Launch

from .cuda_emulation import COMPILER, Emulator

SOURCE = """
#include "device.h"
namespace mmvssm {
struct Args { int32_t* to; int32_t value; };
}
MMVSSM_KERNEL(store_value, mmvssm::Args, 32, 1) {
  p.to[threadIdx.x] = p.value * FACTOR;
}
"""
HAS_NVRTC = nvrtc.find_library() is not None
needs_nvrtc = pytest.mark.skipif(not HAS_NVRTC, reason='pip install nvidia-cuda-nvrtc')
CACHES = (kernels._machine_lacks, kernels._nvrtc_path, kernels.compiler)


@pytest.fixture(autouse=True)
def emulated_gpu():
    """Not here: the machine is what it is."""
    with kernels.use_machine(kernels.Gpu()):
        yield


class Args(ctypes.Structure):
    _fields_ = [('to', c_void_p), ('value', c_int32)]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of its own source, with nothing compiled yet."""
    path = tmp_path / 'store_value.cu'
    path.write_text(SOURCE)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
    return Kernel(str(path), 'store_value')


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled in this process."""
    found, compile_ = [], nvrtc.Nvrtc.compile

    def counted(self, source, constants, architecture):
        found.append((source.name, dict(constants), architecture))
        return compile_(self, source, constants, architecture)

    monkeypatch.setattr(nvrtc.Nvrtc, 'compile', counted)
    return found


def launches(kernel, *factors):
    return [Launch(kernel, dict(FACTOR=f), Args(), 1, 32, 0) for f in factors]


# Compiling


@needs_nvrtc
def test_compiled_once_for_each_set_of_constants(kernel, compilations):
    first = kernels.compiled(kernel, dict(FACTOR=2), 90)
    assert first.startswith(b'\x7fELF')
    assert kernels.compiled(kernel, dict(FACTOR=2), 90) == first
    assert compilations == [('store_value.cu', dict(FACTOR=2), 'sm_90')]
    assert kernels.compiled(kernel, dict(FACTOR=3), 90) != first
    assert kernels.compiled(kernel, dict(FACTOR=2), 80) != first
    assert len(compilations) == 3


@needs_nvrtc
def test_other_sources_are_compiled_again(kernel, compilations, monkeypatch):
    kernels.compiled(kernel, dict(FACTOR=2), 90)
    monkeypatch.setattr(kernels, 'digest', lambda: 'another')
    kernels.compiled(kernel, dict(FACTOR=2), 90)
    assert len(compilations) == 2


def test_digest_follows_sources_and_options(monkeypatch, tmp_path):
    def digest():
        kernels.digest.cache_clear()
        return kernels.digest()

    for name in ('a.cu', 'b.h'):
        (tmp_path / name).write_text('')
    monkeypatch.setattr(nvrtc, 'FOLDER', tmp_path)
    found = [digest(), digest()]
    (tmp_path / 'b.h').write_text('// more')
    found.append(digest())
    monkeypatch.setattr(nvrtc, 'OPTIONS', ('-std=c++20', *nvrtc.OPTIONS[1:]))
    found.append(digest())
    # Where it is installed does not count.
    monkeypatch.setattr(nvrtc, 'OPTIONS', (*nvrtc.OPTIONS[:-1], '--include-path=/b'))
    found.append(digest())
    kernels.digest.cache_clear()
    assert found[0] == found[1] and found[3] == found[4]
    assert len(set(found)) == 3


@needs_nvrtc
def test_error_is_one_clear_line(kernel):
    # NVRTC says something else before.
    source = SOURCE.replace('\n', '#warning a look\n', 1)
    kernel.path.write_text(source.replace('p.value', 'p.values'))
    with pytest.raises(nvrtc.CompileError) as caught:
        kernels.compiled(kernel, dict(FACTOR=2), 90)
    text = str(caught.value)
    assert text.startswith('store_value.cu(7): error: ') and '\n' not in text
    assert 'has no member "values"' in text
    # Nothing is kept of it.
    kernel.path.write_text(SOURCE)
    assert kernels.compiled(kernel, dict(FACTOR=2), 90)


@needs_nvrtc
def test_newer_gpu_than_nvrtc_knows_gets_ptx(kernel):
    newest = kernels.compiler().architecture(999)
    assert newest.startswith('compute_')
    code = kernels.compiled(kernel, dict(FACTOR=2), 999)
    target = newest.replace('compute', 'sm')
    assert f'.target {target}'.encode() in code and b'.entry store_value' in code
    assert kernels.compiler().architecture(90) == 'sm_90'
    with pytest.raises(nvrtc.CompileError, match='no GPU as old as this'):
        kernels.compiler().architecture(20)


@needs_nvrtc
def test_folder_that_cannot_be_written_to(kernel, compilations, monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'file'))
    for _ in range(2):
        code = kernels.compiled(kernel, dict(FACTOR=2), 90)
        assert code.startswith(b'\x7fELF')
    assert len(compilations) == 2
    with pytest.raises(RuntimeError, match="'cuda' cannot run: .*[Dd]irectory"):
        kernels.prepare(launches(kernel, 2), 90)


@needs_nvrtc
def test_locks_that_the_file_system_lacks(kernel, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError('no locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    assert kernels.compiled(kernel, dict(FACTOR=2), 90).startswith(b'\x7fELF')


@needs_nvrtc
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are not forked here')
def test_of_several_processes_one_compiles(kernel, monkeypatch, tmp_path):
    log, compile_ = tmp_path / 'log', nvrtc.Nvrtc.compile

    def slowly(*arguments):
        with log.open('a') as file:
            file.write('compiles\n')
        time.sleep(1)
        return compile_(*arguments)

    monkeypatch.setattr(nvrtc.Nvrtc, 'compile', slowly)
    task = dict(target=kernels.compiled, args=(kernel, dict(FACTOR=2), 90))
    workers = [multiprocessing.get_context('fork').Process(**task) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.read_text() == 'compiles\n'


@needs_nvrtc
def test_of_several_threads_one_compiles(kernel, compilations):
    with ThreadPoolExecutor(4) as pool:
        codes = pool.map(
            lambda _: kernels.compiled(kernel, dict(FACTOR=2), 90), range(4)
        )
        assert len(set(codes)) == 1
    assert len(compilations) == 1


@needs_nvrtc
def test_prepare_compiles_in_several_processes(kernel, compilations, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, 'Popen', lambda *a, **k: started.append(a) or popen(*a, **k)
    )
    asked = launches(kernel, 2, 3, 4, 3)
    assert kernels.prepare(asked, 90, processes=2) == 3
    assert len(started) == 2
    assert kernels.prepare(asked, 90, processes=2) == 0
    assert len(started) == 2
    for launch in asked:
        assert kernels.compiled(kernel, launch.constants, 90)
    assert not compilations


@needs_nvrtc
def test_prepare_says_what_fails(kernel):
    kernel.path.write_text(SOURCE.replace('p.value', 'p.values'))
    with pytest.raises(RuntimeError) as caught:
        kernels.prepare(launches(kernel, 2, 3), 90, processes=2)
    text = str(caught.value)
    assert text.startswith(
        "the scan backend 'cuda' cannot run: store_value.cu(7): error"
    )
    assert '\n' not in text


@needs_nvrtc
def test_all_kernels_are_compiled_without_nvcc(tmp_path):
    """No compiler is on the path, and nothing is kept yet."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, '-m', 'ops.cuda_kernels'],
        cwd=tests,
        env={
            'PYTHONPATH': str(tests.parent),
            'PATH': '',
            CACHE_VARIABLE: str(tmp_path / 'cache'),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sources = set(map(str, nvrtc.FOLDER.glob('*.cu')))
    assert set(done.stdout.split()) == sources
    assert len(list((tmp_path / 'cache').rglob('*.cubin'))) >= len(sources)


# Whether it can run here


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, a driver and NVRTC, as far as anybody looks."""
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    monkeypatch.setattr(driver, 'library', lambda: None)
    monkeypatch.setattr(nvrtc, 'find_library', lambda major: '/nvrtc')
    for cached in CACHES:
        cached.cache_clear()
    yield
    for cached in CACHES:
        cached.cache_clear()


def test_a_machine_with_all_of_it(gpu):
    assert backend_status()['cuda'] is None


@pytest.mark.parametrize(
    'where,name,value,reason',
    [
        (torch.version, 'hip', '6.4', "AMD's (ROCm) get the backend 'torch'"),
        (torch.version, 'cuda', None, 'sees no CUDA device'),
        (torch.cuda, 'is_available', lambda: False, 'sees no CUDA device'),
        (
            *(torch.cuda, 'get_device_capability', lambda *_: (7, 5)),
            'the GPU has compute capability 7.5, it takes 8.0 and later',
        ),
        (nvrtc, 'find_library', lambda major: None, 'no NVRTC of CUDA 13.0 to compile'),
    ],
    ids=['ROCm', 'CPU build', 'no GPU', 'old GPU', 'no NVRTC'],
)
def test_what_is_missing(gpu, monkeypatch, where, name, value, reason):
    monkeypatch.setattr(where, name, value)
    assert reason in backend_status()['cuda']


def test_no_driver(gpu, monkeypatch):
    def library():
        raise OSError('libcuda.so.1: cannot open shared object file')

    monkeypatch.setattr(driver, 'library', library)
    assert "CUDA's driver cannot be reached: libcuda" in backend_status()['cuda']


def test_nothing_is_compiled_to_say_that_it_can_run(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
    assert backend_status()['cuda'] is None
    assert not (tmp_path / 'cache').exists()


@needs_nvrtc
def test_nvrtc_is_found_by_its_package():
    path = Path(nvrtc.find_library())
    assert path.is_file() and 'nvrtc' in path.name
    # One of the wanted version comes first.
    assert nvrtc.find_library('13') == str(path)
    major, minor = nvrtc.Nvrtc(str(path)).version.split('.')
    assert int(major) >= 12 and int(minor) >= 0


def test_environment_report(gpu, monkeypatch):
    """What compiles, and for what; or why nothing does."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    compiler = SimpleNamespace(
        version='13.0', path='/nvrtc', architecture='sm_{}'.format
    )
    monkeypatch.setattr(kernels, 'compiler', lambda: compiler)
    found = collect_env._cuda_kernels()
    assert found['NVRTC'] == '13.0, nvrtc'
    assert found['GPU 0'] == 'compute capability 9.0, gets sm_90'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert collect_env._cuda_kernels()['GPU'] == 'none that torch can use'

    def none():
        raise OSError('there is no NVRTC')

    monkeypatch.setattr(kernels, 'compiler', none)
    assert collect_env._cuda_kernels()['NVRTC'] == 'cannot be used: there is no NVRTC'


# Launching


@pytest.mark.parametrize('grid', [0, -1, 2**31, 2**40])
def test_grids_that_cuda_does_not_count(kernel, grid):
    x = torch.zeros(1)
    with kernels.recording() as found, pytest.raises(ValueError, match='1 to 2\\^31'):
        kernel.launch(dict(FACTOR=1), Args(), grid=grid, threads=32, on=x)
    assert not found


def test_recorder_takes_tensors_without_values(kernel):
    x = torch.zeros(1, device='meta')
    with kernels.recording(multiprocessors=7) as found:
        assert kernels.unavailable() is None and 'meta' in kernels.devices()
        assert kernels.multiprocessors(x) == 7
        kernel.launch(dict(FACTOR=1), Args(), grid=2**31 - 1, threads=32, on=x)
    (launch,) = found
    assert launch.kernel == kernel and launch.grid == 2**31 - 1 and launch.shared == 0
    same = launches(kernel, 1)[0]
    assert launch.binary == same.binary != launches(kernel, 2)[0].binary
    assert kernels.devices() == ('cuda',)


def test_machines_are_left_when_something_fails():
    with pytest.raises(KeyError), kernels.use_machine(Emulator()):
        raise KeyError
    assert kernels.devices() == ('cuda',)


DRIVER = """
#include <string.h>
typedef struct {
  int device, loads, loads_on, attribute, attribute_value, launches, launched_on;
  int fails, grid, threads, shared;
  void *stream, *function;
  char code[8], entry[16], args[16];
} Log;
Log driver_log;
int driver_device = 0;
int cuModuleLoadData(void** module, const char* code) {
  driver_log.loads++, driver_log.loads_on = driver_device;
  strncpy(driver_log.code, code, 7);
  *module = (void*)0x123456789abc;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* entry) {
  strncpy(driver_log.entry, entry, 15);
  *function = (char*)module + 1;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  driver_log.attribute = attribute, driver_log.attribute_value = value;
  return value > 232448;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* found, void* function, int threads,
                                                size_t shared) {
  *found = 2048 / threads;
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z,
                   unsigned threads, unsigned threads_y, unsigned threads_z,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (y != 1 || z != 1 || threads_y != 1 || threads_z != 1 || extra) return 1;
  driver_log.launches++, driver_log.launched_on = driver_device;
  driver_log.grid = x, driver_log.threads = threads, driver_log.shared = shared;
  driver_log.stream = stream, driver_log.function = function;
  memcpy(driver_log.args, parameters[0], 16);
  return driver_log.fails;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 700 ? "an illegal memory access" : 0;
  return 0;
}
"""


class Log(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int)
            for name in (
                *('device', 'loads', 'loads_on', 'attribute', 'attribute_value'),
                *('launches', 'launched_on', 'fails', 'grid', 'threads', 'shared'),
            )
        ),
        *(('stream', c_void_p), ('function', c_void_p)),
        *(('code', ctypes.c_char * 8), ('entry', ctypes.c_char * 16), ('args', Args)),
    ]


@pytest.fixture(scope='module')
def driver_path(tmp_path_factory):
    if COMPILER is None or os.name == 'nt':
        pytest.skip('needs a C compiler')
    folder = tmp_path_factory.mktemp('driver')
    (folder / 'driver.c').write_text('#include <stddef.h>\n' + DRIVER)
    command = [COMPILER, '-x', 'c', '-shared', '-fPIC', str(folder / 'driver.c'), '-o']
    subprocess.run([*command, str(folder / 'libcuda.so.1')], check=True)
    return folder / 'libcuda.so.1'


@pytest.fixture
def cuda(driver_path, monkeypatch):
    """Two GPUs, the first one being current; what the driver is told."""
    load = ctypes.CDLL
    library = load(str(driver_path))
    current = c_int.in_dll(library, 'driver_device')
    log = Log.in_dll(library, 'driver_log')
    ctypes.memset(ctypes.addressof(log), 0, ctypes.sizeof(log))

    def exchange(index):
        before = current.value
        if index >= 0:
            current.value = index
        return before

    monkeypatch.setattr(
        ctypes,
        'CDLL',
        lambda name, *a: library if name == 'libcuda.so.1' else load(name, *a),
    )
    cached = driver.library
    cached.cache_clear()
    monkeypatch.setattr(torch.cuda, '_exchange_device', exchange)
    monkeypatch.setattr(torch.cuda, '_maybe_exchange_device', exchange)
    monkeypatch.setattr(
        torch.cuda,
        'current_stream',
        lambda device: SimpleNamespace(cuda_stream=2**46 + device.index),
    )
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(kernels, '_properties', lambda _: properties)
    monkeypatch.setattr(kernels, 'compiled', lambda *_: b'cubin')
    yield SimpleNamespace(log=log, current=current, gpu=kernels.Gpu())
    cached.cache_clear()


def on(index):
    return SimpleNamespace(device=torch.device('cuda', index))


def launch(kernel, shared=0):
    args = Args(to=2**45, value=-3)
    return Launch(kernel, dict(FACTOR=1), args, 2**31 - 1, 64, shared)


def test_launch_on_another_device_than_the_current_one(kernel, cuda):
    cuda.gpu.launch(launch(kernel), on(1))
    log = cuda.log
    assert cuda.current.value == 0
    assert (log.loads_on, log.launched_on) == (1, 1)
    assert (log.code, log.entry) == (b'cubin', b'store_value')
    assert (log.grid, log.threads, log.shared) == (2**31 - 1, 64, 0)
    assert log.stream == 2**46 + 1 and log.function == 0x123456789ABD
    assert (log.args.to, log.args.value) == (2**45, -3)


def test_code_is_loaded_once_for_each_device(kernel, cuda):
    for index in (1, 1, 0, 1, 0):
        cuda.gpu.launch(launch(kernel), on(index))
        assert cuda.log.launched_on == index and cuda.current.value == 0
    assert (cuda.log.loads, cuda.log.launches) == (2, 5)
    assert cuda.gpu.multiprocessors(on(1)) == 132


def test_much_shared_memory_is_asked_for_once(kernel, cuda):
    cuda.gpu.launch(launch(kernel, 48 * 1024), on(0))
    assert cuda.log.attribute == 0
    for shared in (100_000, 60_000):
        cuda.gpu.launch(launch(kernel, shared), on(0))
        assert cuda.log.shared == shared
        # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        assert (cuda.log.attribute, cuda.log.attribute_value) == (8, 100_000)
    with pytest.raises(driver.CudaError, match='300000 bytes of shared memory for'):
        cuda.gpu.launch(launch(kernel, 300_000), on(0))


def test_failing_launch_leaves_the_current_device(kernel, cuda):
    cuda.log.fails = 700
    reason = 'launching store_value: an illegal memory access'
    with pytest.raises(driver.CudaError, match=reason):
        cuda.gpu.launch(launch(kernel), on(1))
    assert cuda.current.value == 0
    cuda.log.fails = 701
    with pytest.raises(driver.CudaError, match='store_value: error 701'):
        cuda.gpu.launch(launch(kernel), on(1))


def test_code_that_cannot_be_compiled_is_remembered(kernel, cuda, gpu, monkeypatch):
    def refuse(*_):
        raise nvrtc.CompileError('a.cu(1): error: no such thing')

    monkeypatch.setattr(kernels, 'compiled', refuse)
    assert cuda.gpu.unavailable() is None
    with pytest.raises(RuntimeError, match="'cuda' cannot run: a.cu.*no such thing$"):
        cuda.gpu.launch(launch(kernel), on(1))
    assert cuda.gpu.unavailable() == 'a.cu(1): error: no such thing'
    assert cuda.current.value == 0


def test_resident_ctas(kernel, cuda):
    function = driver.Function(b'cubin', kernel.entry, 0)
    assert function.resident_ctas(128, 60_000) == 16
    assert cuda.log.attribute_value == 60_000
