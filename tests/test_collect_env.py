"""mmvssm.collect_env: the report of versions and scan backends."""

from importlib import metadata

import pytest
import torch

import mmvssm
from mmvssm import collect_env as module
from mmvssm.ops import backend_status
from mmvssm.ops.backends import ENV_VARIABLE
from mmvssm.ops.cpu import library


@pytest.fixture
def installed(monkeypatch):
    """Replace the installed distributions by a dict of versions."""

    def pretend(versions):
        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(module.metadata, 'version', version)

    return pretend


def test_report_names_versions_and_every_backend(capsys):
    module.main()
    report = capsys.readouterr().out
    for text in (mmvssm.__version__, torch.__version__, 'mmseg', 'mmdet'):
        assert text in report
    backends = module.collect_env()['Scan backends']
    assert list(backends) == list(backend_status())


def test_processor_and_blas_are_named(monkeypatch, tmp_path):
    machine = module.collect_env()['Machine']
    assert 'cores usable' in machine['CPU']
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text(
        'vendor_id: Maker\ncpu family\t: 6\nmodel: 9\nstepping: 1\nflags: fpu avx2\n'
        '\nvendor_id: that of the second core\n'
    )
    found = module._cpuinfo(cpuinfo)
    monkeypatch.setattr(module, '_cpuinfo', lambda: found)
    machine = module.collect_env()['Machine']
    assert machine['CPU model'] == 'Maker, family 6, model 9, stepping 1'
    assert machine['instruction sets'] == 'avx2'
    monkeypatch.setattr(module.torch.__config__, 'parallel_info', lambda: '\tMy-DNN v3')
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    blas = module.collect_env()['Packages']['BLAS']
    assert blas.startswith('My-DNN v3') and 'OMP_NUM_THREADS=2' in blas


def test_backend_that_cannot_run_says_why(monkeypatch):
    status = {'torch': None, 'reference': 'no reason at all'}
    monkeypatch.setattr(module, 'backend_status', lambda: status)
    backends = module.collect_env()['Scan backends']
    assert backends['torch'].startswith('can run')
    assert backends['reference'] == 'cannot run: no reason at all'


def test_choice_follows_the_environment_variable(monkeypatch):
    monkeypatch.setenv(ENV_VARIABLE, 'reference')
    chosen = module.collect_env()['Backend a tensor gets']
    assert chosen['cpu'] == 'reference'
    assert chosen['cuda'].startswith('reference')
    assert chosen[ENV_VARIABLE] == 'reference'


def test_unknown_backend_is_reported_not_raised(monkeypatch):
    monkeypatch.setenv(ENV_VARIABLE, 'turbo')
    assert "'turbo'" in module.collect_env()['Backend a tensor gets']['cpu']


def test_choice_that_differs_by_dtype_names_the_dtypes(monkeypatch):
    def explain(device, dtype):
        first = 'chosen' if dtype == torch.float32 else 'not needed'
        return {'cpu': first, 'torch': 'chosen'}

    monkeypatch.setattr(module, 'explain_backend', explain)
    chosen = module.collect_env()['Backend a tensor gets']
    assert chosen['cpu'] == 'cpu (float32); torch (bfloat16, float16)'


def test_kernels_name_the_instruction_set_in_use(monkeypatch):
    monkeypatch.setattr(library, 'unavailable', lambda: None)
    monkeypatch.setattr(library, 'isa', lambda: 'avx2')
    monkeypatch.setattr(library, 'available_isas', lambda: ['avx2', 'baseline'])
    monkeypatch.setattr(library, 'is_threaded', lambda: True)
    monkeypatch.setenv(library.ISA_VARIABLE, 'avx2')
    assert module.collect_env()['CPU kernels'] == {
        'instruction set': 'avx2 (there are avx2, baseline)',
        'threads': 'those of torch',
        library.ISA_VARIABLE: 'avx2',
        library.LIBRARY_VARIABLE: 'not set',
    }


def test_kernels_without_the_threads_of_torch(monkeypatch):
    monkeypatch.setattr(library, 'unavailable', lambda: None)
    monkeypatch.setattr(library, 'isa', lambda: 'baseline')
    monkeypatch.setattr(library, 'available_isas', lambda: ['baseline'])
    monkeypatch.setattr(library, 'is_threaded', lambda: False)
    threads = module.collect_env()['CPU kernels']['threads']
    assert threads == f'one: torch {torch.__version__} lends none, 2.10 and later do'


def test_torch_lends_its_threads_from_2_10_on():
    version = tuple(map(int, torch.__version__.split('.')[:2]))
    assert library.is_threaded() == (version >= (2, 10))


def test_kernels_that_are_not_built_say_why(monkeypatch):
    monkeypatch.setattr(library, 'unavailable', lambda: 'never compiled')
    kernels = module.collect_env()['CPU kernels']
    assert kernels['instruction set'] == 'none: never compiled'
    assert 'threads' not in kernels


def test_missing_packages_are_reported_with_their_use(installed):
    installed({})
    packages = module.collect_env()['Packages']
    assert packages['mmdet'] == 'not installed (needed for detection)'
    assert packages['mamba_ssm'] == 'not installed'


def test_fork_beside_original_is_a_conflict(installed):
    installed({'onedl-mmengine': '0.10.12', 'mmengine': '0.10.7', 'mmdet': '3.3.0'})
    packages = module.collect_env()['Packages']
    assert 'CONFLICT' in packages['mmengine']
    assert packages['mmdet'] == '3.3.0 (mmdet)'


def test_machine_without_compilers(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert module.collect_env()['Machine']['C++ compiler'] == 'no c++ on the path'
