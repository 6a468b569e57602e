"""Which build of the kernels runs; its instruction sets, memory and threads."""

import ctypes
import ctypes.util
import os
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
from mmvssm.ops.cpu import library

from .backends_under_test import ISAS, on_backends, on_every_isa
from .scan_inputs import gradients, scan_inputs

needs_kernels = on_backends('cpu')


@pytest.fixture
def reload_library():
    """Forget which library and which instruction set are in use, before and after."""

    def reload():
        library._library.cache_clear()
        library._default_isa.cache_clear()

    reload()
    yield
    reload()


def assert_torch_takes_over(reason):
    """The status says why the backend cannot run; only a call that names it raises."""
    assert reason in backend_status()['cpu']
    assert choose_backend('cpu', torch.float32) == 'torch'
    inputs = scan_inputs(1, 2, 3, 1, dtype=torch.float32, requires_grad=False)
    assert selective_scan(**inputs).isfinite().all()
    with pytest.raises(BackendUnavailableError) as error:
        selective_scan(**inputs, backend='cpu')
    assert reason in str(error.value)


def test_library_that_was_not_built(reload_library, monkeypatch, tmp_path):
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library, '__file__', str(tmp_path / 'library.py'))
    assert_torch_takes_over('it was not compiled when mmvssm was installed')


def test_library_of_another_version(reload_library, monkeypatch):
    """Kernel args of another size would be read as garbage."""
    other = ctypes.util.find_library('c')
    monkeypatch.setenv(library.LIBRARY_VARIABLE, other)
    assert_torch_takes_over('built from the sources of another version')


@needs_kernels
def test_library_with_other_kernel_args(backend, reload_library, monkeypatch):
    class Longer(library.Ss2dArgs):
        _fields_ = [('more', ctypes.c_int64)]

    monkeypatch.setattr(library, 'Ss2dArgs', Longer)
    assert_torch_takes_over('built from the sources of another version')


def test_library_that_is_not_there(reload_library, monkeypatch, tmp_path):
    path = tmp_path / 'kernels.so'
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(path))
    assert_torch_takes_over(str(path))


def test_file_that_is_no_library(reload_library, monkeypatch, tmp_path):
    path = tmp_path / 'kernels.so'
    path.write_text('no library')
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(path))
    assert_torch_takes_over(str(path))


@needs_kernels
def test_unknown_instruction_set(backend, reload_library, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, 'mmx')
    assert_torch_takes_over("instruction set 'mmx' is not available; there are [")
    assert 'baseline' in backend_status()[backend]


@needs_kernels
def test_use_isa(backend):
    before = library.isa()
    with pytest.raises(ValueError, match="'mmx' is not available.*baseline"):
        library.use_isa('mmx').__enter__()
    with library.use_isa('baseline'):
        assert library.isa() == 'baseline' and library.lanes() == 4
        with pytest.raises(RuntimeError, match='inside'), library.use_isa(before):
            assert library.isa() == before
            raise RuntimeError('inside')
        assert library.isa() == 'baseline'
    assert library.isa() == before


@needs_kernels
def test_best_instruction_set_comes_first(backend):
    """Nothing that torch finds on this machine is missing."""
    available = library.available_isas()
    assert available == [name for name in reversed(ISAS) if name in available]
    assert available[-1] == 'baseline'
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ('AVX2', 'AVX512'):
        assert capability.lower() in available


SCRIPT = """
import sys
import torch
from mmvssm.ops import linear_attention, selective_scan, ss2d_scan
from mmvssm.ops.cpu import library
from ops.scan_inputs import gradients, scan_inputs, ss2d_inputs

results = [library.isa()]
for isa in library.available_isas():
    for shape in [(1, 17, 33, 3, 1), (2, 64, 70, 1, 2), (1, 20, 40, 24, 1)]:
        with library.use_isa(isa):
            inputs = scan_inputs(*shape, dtype=torch.float32)
            out, last = selective_scan(
                **inputs, delta_softplus=True, return_last_state=True, backend='cpu'
            )
            results += [out, last, *gradients((out, last), inputs).values()]
            inputs = ss2d_inputs(*shape[:2], 5, 8, shape[3], 3, dtype=torch.float32)
            y = ss2d_scan(**inputs, backend='cpu')
            results += [y, *gradients((y,), inputs).values()]
            inputs = dict.fromkeys('qkv', inputs['x'].flatten(2))
            y = linear_attention(**inputs, normalise=shape[4] == 1, backend='cpu')
            results += [y, *gradients((y,), inputs).values()]
torch.save([x.detach() if torch.is_tensor(x) else x for x in results], sys.argv[1])
"""


def run_script(path, script=SCRIPT, **variables):
    """What a script saved in a process of its own."""
    tests = str(Path(__file__).parents[1])
    before = os.environ.get('PYTHONPATH')
    environment = {
        **os.environ,
        **variables,
        'PYTHONPATH': os.pathsep.join([tests, before] if before else [tests]),
    }
    subprocess.run(
        [sys.executable, '-c', script, str(path)], env=environment, check=True
    )
    return torch.load(path)


@needs_kernels
def test_environment_and_unset_memory(backend, tmp_path):
    """The same bits where malloc fills what it hands out with huge numbers."""
    clean, dirty = (
        run_script(tmp_path / value, MMVSSM_CPU_ISA='baseline', MALLOC_PERTURB_=value)
        for value in ('0', '128')
    )
    assert clean[0] == dirty[0] == 'baseline'
    assert len(clean) == len(dirty)
    for a, b in zip(clean[1:], dirty[1:]):
        assert torch.equal(a, b)


@on_every_isa()
def test_threads_of_python(isa, set_threads):
    """Several Python threads call the kernels at once; all share torch's threads."""
    set_threads(3)
    every_inputs = [
        scan_inputs(2, 40 + 10 * i, 300, 1 + i, 2, dtype=torch.float32, seed=i)
        for i in range(4)
    ]

    def run(inputs):
        out = selective_scan(**inputs, delta_softplus=True, backend='cpu')
        return [out, *gradients((out,), inputs).values()]

    with library.use_isa(isa):
        expected = [run(inputs) for inputs in every_inputs]
        found = [[] for _ in every_inputs]
        ready = threading.Barrier(len(every_inputs))

        def repeat(i):
            ready.wait()
            found[i] = [run(every_inputs[i]) for _ in range(10)]

        threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for want, runs in zip(expected, found):
        assert len(runs) == 10
        for got in runs:
            assert all(torch.equal(a, b) for a, b in zip(got, want))


# Scans as a data set computes them, in the process itself and in workers of a loader
# that are forked from a process with a pool of threads.
WORKERS = """
import sys

import torch
from torch.utils.data import DataLoader, Dataset

from mmvssm.ops import selective_scan
from ops.scan_inputs import scan_inputs


class Scans(Dataset):
    def __init__(self):
        self.inputs = [
            scan_inputs(1, 256, 99, 2, dtype=torch.float32, seed=i, requires_grad=False)
            for i in range(6)
        ]
        self.found = None

    def __len__(self):
        return 6

    def __getitem__(self, index):
        # All before a worker sends its first, for which it starts threads of its own.
        if self.found is None:
            self.found = [self.scan(x) for x in self.inputs]
        return self.found[index]

    def scan(self, inputs):
        before = threads()
        out = selective_scan(**inputs, delta_softplus=True, backend='cpu')
        return out, before, threads()


def threads():
    # Python's module counts its own threads only.
    with open('/proc/self/status') as file:
        return int(next(line for line in file if line.startswith('Threads:'))[8:])


found = {}
for name, count in (('one', 1), ('three', 3)):
    data = Scans()
    torch.set_num_threads(count)
    found[name] = [data[i] for i in range(6)]
loader = DataLoader(
    Scans(), batch_size=None, num_workers=2, multiprocessing_context='fork', timeout=60)
found['workers'] = list(loader)
torch.save(found, sys.argv[1])
"""


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_workers_and_one_thread_start_no_threads(backend, tmp_path):
    """Where torch has one thread, a scan starts none that would compete for a core."""
    found = run_script(tmp_path / 'found', WORKERS)
    for name in ('one', 'workers'):
        assert [after for _, _, after in found[name]] == [
            before for _, before, _ in found[name]
        ]
    # That the number of threads can be seen.
    assert found['three'][0][2] > found['one'][-1][2]
    for scans in zip(*found.values()):
        outputs = [out for out, *_ in scans]
        assert all(torch.equal(out, outputs[0]) for out in outputs)
