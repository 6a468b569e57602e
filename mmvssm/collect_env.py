"""What is installed here and which scan backends can run.

``python -m mmvssm.collect_env`` prints the report to paste into an issue.
Versions are read from the installed metadata. So packages that cannot be imported (a
torchvision built for another torch, an mmdet that refuses the installed mmcv) are
reported, too.
"""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

import mmvssm
from mmvssm.ops.backends import (
    ENV_VARIABLE,
    BackendUnavailableError,
    backend_status,
    backend_summary,
    explain_backend,
)
from mmvssm.ops.cache import CACHE_VARIABLE, cache_folder
from mmvssm.ops.cpu import library
from mmvssm.ops.cuda import kernels
from mmvssm.ops.gpu_check.verdicts import HOW
from mmvssm.ops.gpu_check.verdicts import VARIABLE as GPU_CHECK_VARIABLE
from mmvssm.ops.operator import all_ops

# Import name -> the distributions that have it; at most one may be installed.
_DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'mamba_ssm': ('mamba-ssm',),
    'torchvision': ('torchvision',),
    'timm': ('timm',),
    'segmentation_models_pytorch': ('segmentation-models-pytorch',),
    'numpy': ('numpy',),
    'safetensors': ('safetensors',),
    'onnx': ('onnx',),
    'onnxscript': ('onnxscript',),
    'onnxruntime': ('onnxruntime', 'onnxruntime-gpu', 'onnxruntime-openvino'),
    'openvino': ('openvino',),
}
_USED_FOR = {
    'mmengine': 'needed; pip install onedl-mmengine',
    'mmcv': 'needed by mmseg and mmdet',
    'mmseg': 'needed for segmentation',
    'mmdet': 'needed for detection',
    'mmpretrain': 'needed for classification; make install-vision',
    'torchvision': 'needed by mmpretrain and timm',
    'timm': 'needed for mmvssm.timm',
    'onnx': 'needed for export; pip install "mmvssm[export]"',
    'onnxscript': 'needed for export',
    'onnxruntime': 'needed for export',
    'openvino': 'checks exported files, too',
}
_THREAD_VARIABLES = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'MKL_CBWR')
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def collect_env() -> dict[str, dict[str, str]]:
    """Describe the machine, the packages and the scan backends.

    Returns:
        Section title -> name -> one line of text. This needs neither mmcv, mmseg nor
        mmdet, and raises no error if another package is broken.
    """
    return {
        'Machine': _machine(),
        'Packages': {'mmvssm': mmvssm.__version__, 'torch': _torch(), 'BLAS': _blas()}
        | {name: _package(name) for name in _DISTRIBUTIONS},
        'Scan backends': {
            name: f'cannot run: {reason}'
            if reason
            else f'can run ({backend_summary(name)})'
            for name, reason in backend_status().items()
        },
        'CPU kernels': _kernels(),
        'GPU kernels by default': _gpu_check() | _variables(GPU_CHECK_VARIABLE),
        'CUDA kernels': _cuda_kernels() | _variables(CACHE_VARIABLE),
        'Backend a tensor gets': {device: _choice(device) for device in ('cpu', 'cuda')}
        | _variables(ENV_VARIABLE),
    }


def _machine() -> dict[str, str]:
    gpus = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus[f'GPU {index}'] = (
                f'{gpu.name}, compute capability {gpu.major}.{gpu.minor}, '
                f'{gpu.total_memory / 2**30:.0f} GiB'
            )
    return {
        'OS': platform.platform(),
        'CPU': f'{_cpu_name()}, {_usable_cores()} cores usable',
        'CPU model': _cpu_model(),
        'instruction sets': _instruction_sets(),
        **(gpus or {'GPU': 'none that torch can use'}),
        'Python': platform.python_version(),
        'C++ compiler': _first_line('c++', '--version'),
    }


def _cpu_name() -> str:
    return _cpuinfo().get('model name') or platform.processor() or platform.machine()


def _cpu_model() -> str:
    """Maker and model numbers: two processors of one name may differ."""
    info = _cpuinfo()
    names = {'cpu family': 'family', 'model': 'model', 'stepping': 'stepping'}
    parts = [f'{name} {info[key]}' for key, name in names.items() if key in info]
    return ', '.join([info.get('vendor_id', 'unknown maker'), *parts])


def _instruction_sets() -> str:
    """The instruction sets by which libraries choose their code."""
    flags = _cpuinfo().get('flags', '').split()
    wanted = (
        'sse4_2',
        'avx',
        'avx2',
        'fma',
        'avx512',
        'avx_vnni',
        'amx',
        'asimd',
        'sve',
    )
    return ' '.join(f for f in flags if f.startswith(wanted)) or 'unknown'


def _cpuinfo(path: Path = Path('/proc/cpuinfo')) -> dict[str, str]:
    """What Linux says about the first core; empty on other systems."""
    if not path.exists():
        return {}
    first = path.read_text().partition('\n\n')[0]
    pairs = (line.partition(':')[::2] for line in first.splitlines())
    return {key.strip(): value.strip() for key, value in pairs}


def _usable_cores() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_line(program: str, *arguments: str) -> str:
    """The first line that a program prints, or that it is not on the path."""
    path = shutil.which(program)
    if path is None:
        return f'no {program} on the path'
    try:
        out = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f'{path} fails: {error}'
    lines = out.stdout.strip().splitlines()
    return lines[0] if lines else f'{path} prints no version'


def _torch() -> str:
    cuda = torch.version.cuda or torch.version.hip
    build = f'built for CUDA {cuda}' if cuda else 'a build without CUDA'
    return f'{torch.__version__}, {build}, {torch.get_num_threads()} threads'


def _blas() -> str:
    """Libraries behind torch's matrix products on the CPU, and their threads."""
    lines = torch.__config__.parallel_info().splitlines()
    libraries = [line.strip() for line in lines if 'Library' in line or 'DNN' in line]
    kind = [
        part.strip()
        for part in torch.__config__.show().replace('\n', ',').split(',')
        if part.strip().startswith(('BLAS_INFO', 'LAPACK_INFO'))
    ]
    variables = [f'{n}={os.environ[n]}' for n in _THREAD_VARIABLES if n in os.environ]
    return '; '.join([*libraries, *kind, *variables]) or 'unknown'


def _package(module: str) -> str:
    """Version and distribution of a module, and its problem if it has one."""
    found = {}
    for distribution in _DISTRIBUTIONS[module]:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    if not found:
        used_for = _USED_FOR.get(module)
        return f'not installed ({used_for})' if used_for else 'not installed'
    text = ', '.join(f'{version} ({name})' for name, version in found.items())
    if module == 'mmcv':
        text += f', with{"" if _has_mmcv_ops() else "out"} compiled ops'
    if len(found) > 1:
        text += (
            '; CONFLICT: they overwrite each other, pip uninstall all of them '
            'and install one'
        )
    return text


def _has_mmcv_ops() -> bool:
    try:
        folders = find_spec('mmcv').submodule_search_locations
    except (ImportError, ValueError, AttributeError):
        return False
    return any(any(Path(folder).glob('_ext*')) for folder in folders or ())


def _kernels() -> dict[str, str]:
    """The instruction set and the threads of the backend 'cpu'."""
    variables = _variables(library.ISA_VARIABLE, library.LIBRARY_VARIABLE)
    reason = library.unavailable()
    if reason:
        return {'instruction set': f'none: {reason}'} | variables
    names = ', '.join(library.available_isas())
    threads = 'those of torch'
    if not library.is_threaded():
        threads = f'one: torch {torch.__version__} lends none, 2.10 and later do'
    return {
        'instruction set': f'{library.isa()} (there are {names})',
        'threads': threads,
    } | variables


def _cuda_kernels() -> dict[str, str]:
    """The compiler of the kernels of the backend 'cuda', and its targets."""
    found = {'compiled into': str(cache_folder())}
    try:
        compiler = kernels.compiler()
        # Without its folder: reports and results are passed on.
        found['NVRTC'] = f'{compiler.version}, {Path(compiler.path).name}'
    except (OSError, RuntimeError) as error:
        return found | {'NVRTC': f'cannot be used: {error}'}
    if torch.version.cuda is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            what = compiler.architecture(10 * major + minor)
            found[f'GPU {index}'] = f'compute capability {major}.{minor}, gets {what}'
    else:
        found['GPU'] = 'none that torch can use'
    return found


def _variables(*names: str) -> dict[str, str]:
    return {name: os.environ.get(name) or 'not set' for name in names}


def _gpu_check() -> dict[str, str]:
    """The verdicts of the check of the GPU kernels, op by op."""
    if not torch.cuda.is_available():
        return {'all ops': 'there is no GPU that torch can use'}
    return {
        name: explain_backend('cuda', torch.float32, op=name)['cuda']
        for name, op in all_ops.items()
        if 'cuda' in op.backends
    } | {'checked by hand with': HOW}


def _choice(device: str) -> str:
    """The backend for tensors of this device, with the dtypes if they differ."""
    chosen = {}
    for dtype in _DTYPES:
        try:
            found = explain_backend(device, dtype)
            backend = next(n for n, why in found.items() if why.startswith('chosen'))
        except (BackendUnavailableError, ValueError) as error:
            backend = f'none: {error}'
        chosen.setdefault(backend, []).append(str(dtype).removeprefix('torch.'))
    text = '; '.join(
        name if len(chosen) == 1 else f'{name} ({", ".join(dtypes)})'
        for name, dtypes in chosen.items()
    )
    if device == 'cuda' and not torch.cuda.is_available():
        text += ' (there is no such device here)'
    return text


def main() -> None:
    """Print the report."""
    for title, entries in collect_env().items():
        print(title)
        width = max(map(len, entries))
        for name, text in entries.items():
            print(f'  {name:<{width}}  {text}')


if __name__ == '__main__':
    main()
