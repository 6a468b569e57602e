"""What a result is filed under, so that those of several machines lie side by side."""

import os
import re
from pathlib import Path

import torch

from mmvssm.collect_env import collect_env
from mmvssm.ops.cpu import library

HERE = Path(__file__).resolve().parent
_VARIABLES = (
    *('ATEN_CPU_CAPABILITY', 'ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA'),
    *('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME'),
)


def name() -> str:
    """Processor, instruction set of our kernels and cores, fit for a file's name.

    For example ``amd-family-25-model-17-stepping-1-avx512-2-cores``.
    """
    machine = collect_env()['Machine']
    model, processor = machine['CPU model'], machine['CPU']
    if 'model' not in model:
        model = processor.rpartition(',')[0]
    cores = re.findall(r'(\d+) cores', processor)[-1]
    isa = 'no-kernels' if library.unavailable() else library.isa()
    text = f'{model} {isa} {cores} cores'.lower()
    text = text.replace('authenticamd', 'amd').replace('genuineintel', 'intel')
    return re.sub('[^a-z0-9]+', '-', text).strip('-')


def results_file(benchmark: str) -> Path:
    """Where the result of a benchmark on this machine belongs."""
    return HERE / 'results' / benchmark / f'{name()}.json'


def variables() -> dict[str, str]:
    """Environment variables that change how libraries compute, where they are set."""
    return {n: os.environ[n] for n in _VARIABLES if n in os.environ}


def facts() -> dict:
    """The machine and the versions, to be kept with a result."""
    return dict(
        machine=name(),
        torch_instruction_set=torch.backends.cpu.get_cpu_capability(),
        variables=variables(),
        load_average=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        environment=collect_env(),
    )
