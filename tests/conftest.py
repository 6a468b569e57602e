"""Long files first, for runs in several processes; the longest tests by request."""

import os
from pathlib import Path

HERE = Path(__file__).parent
# Those of half a minute or more on one core, the longest first. A process takes one
# file after the other, in this order with --no-loadscope-reorder; begun last, one of
# them would go on while the other processes have nothing to do.
LONG_FILES = (
    'slurm/test_jobs.py',
    'test_packaging.py',
    'export/test_onnx_model.py',
    'export/test_tools.py',
    'benchmarks/test_gpu_counts.py',
    'ops/test_cuda.py',
    'test_benchmarks.py',
    'benchmarks/test_gpu_suite.py',
    'test_detection_configs.py',
    'hosts/test_mmdet.py',
    'test_parity.py',
    'engine/hooks/test_recovery.py',
    'test_builders.py',
    'zoo/test_tools.py',
    'backbones/test_compile.py',
    'test_contracts.py',
    'test_adapters.py',
    'ops/gpu_check/test_command.py',
    'ops/gpu_check/test_run.py',
    'engine/launching/test_gpu_check.py',
    'engine/training/test_shards.py',
    'engine/training/test_sharding.py',
    'test_import.py',
)
PLACES = {HERE / name: place for place, name in enumerate(LONG_FILES)}


def pytest_configure(config):
    """With MMVSSM_LONG_TESTS=1 long tests are run with all others."""
    asked = os.environ.get('MMVSSM_LONG_TESTS', '0') not in ('', '0')
    if asked and config.option.markexpr == 'not long':
        config.option.markexpr = ''


def pytest_collection_modifyitems(config, items):
    if hasattr(config, 'workerinput'):
        items.sort(key=lambda item: PLACES.get(item.path, len(PLACES)))
