"""The package as users install it: imports, wheel contents, mim's look-ups."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from mmengine.utils import is_installed

import mmvssm
from mmvssm.ops import backend_status
from mmvssm.ops.cuda import nvrtc

ROOT = Path(__file__).resolve().parents[1]
LINKED = ('configs', 'tools', 'model-index.yml')
BUILT = ('mmvssm', 'pyproject.toml', 'setup.py', 'MANIFEST.in', 'LICENSE', 'README.md')
JUNK = shutil.ignore_patterns('__pycache__', '*.pyc', '*.so')
BUILD = 'from setuptools.build_meta import build_{} as build; build({!r})'
KERNELS = 'mmvssm/ops/cpu/_kernels.so'
# Quick to compile, and with an instruction set that must not reach the baseline.
CXXFLAGS = '-O0 -march=native' if platform.machine() == 'x86_64' else '-O0'
has_compiler = any(map(shutil.which, ('c++', 'g++', 'clang++')))
needs_compiler = pytest.mark.skipif(not has_compiler, reason='no C++ compiler')
NO_COMPILER = dict(PATH='', CXX='', MMVSSM_REQUIRE_KERNELS='')
# Writes down what it is told, says that it targets x86-64, leaves empty files.
FAKE_COMPILER = """#!/bin/sh
echo "$*" >> {log}
echo '#define __x86_64__ 1'
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""

# Run before the code under test: these packages cannot be imported.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Block())
"""


def run(*arguments, cwd=ROOT, succeeds=True, **environment):
    """Run this Python in a process; its output is the failure message."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        # Warnings of other packages at their import are no output.
        env=os.environ | dict(PYTHONWARNINGS='ignore') | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def copy_source(target):
    """Copy what a package is built from, links as links."""
    target.mkdir(exist_ok=True)
    for name in BUILT + LINKED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=JUNK)
        elif source.exists():
            shutil.copy(source, target / name)


def build(kind, source, target, **environment):
    """Build a 'wheel', 'sdist' or 'editable' without network; return its path."""
    run('-c', BUILD.format(kind, str(target)), cwd=source, **environment)
    (archive,) = target.iterdir()
    return archive


def files_of(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp('source')
    copy_source(source)
    target = tmp_path_factory.mktemp('wheel')
    return build('wheel', source, target, CXXFLAGS=CXXFLAGS)


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's contents, as site-packages would hold them."""
    target = tmp_path_factory.mktemp('site')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture
def fake_compiler(tmp_path):
    """Its path, and the file where each of its runs leaves a line."""
    compiler, log = tmp_path / 'fake++', tmp_path / 'log'
    compiler.write_text(FAKE_COMPILER.format(log=log))
    compiler.chmod(0o755)
    return compiler, log


@pytest.fixture
def source(tmp_path):
    copy_source(tmp_path / 'source')
    return tmp_path / 'source'


@pytest.mark.parametrize(
    'names',
    [
        ('mmcv', 'mmseg', 'mmdet'),
        (
            *('mmcv', 'mmseg', 'mmdet', 'cv2', 'mamba_ssm', 'skimage'),
            *('timm', 'torchvision', 'mmpretrain', 'segmentation_models_pytorch'),
        ),
    ],
)
def test_package_needs_torch_and_mmengine_only(names):
    code = BLOCK.format(names=names) + (
        'import mmvssm, mmvssm.ops, mmvssm.backbones, mmvssm.collect_env\n'
        'mmvssm.collect_env.main()\n'
        'import torch\n'
        "net = mmvssm.build_backbone('vmamba_t_s1l8', out_indices=(3,))\n"
        'print(net.eval()(torch.zeros(1, 3, 32, 32))[0].shape)\n'
    )
    assert run('-c', code).endswith('torch.Size([1, 768, 1, 1])\n')


def test_mim_folder_links_to_the_repository():
    for name in LINKED:
        assert (ROOT / 'mmvssm' / '.mim' / name).resolve() == ROOT / name


def test_model_index_imports_existing_files():
    imported = re.findall(r'- (\S+)', (ROOT / 'model-index.yml').read_text())
    assert imported
    assert all((ROOT / name).is_file() for name in imported)


def test_wheel_holds_the_package_and_real_copies_of_configs_and_tools(installed):
    sources = {
        name
        for name in files_of(ROOT / 'mmvssm')
        if not name.endswith(('.cpp', '.h', '.so'))
    }
    assert sources - files_of(installed / 'mmvssm') == set()
    # What mmvssm.export.torch_library compiles.
    compiled_later = {'export/torch_library.cpp', 'ops/cpu/kernel_args.h'}
    assert compiled_later <= files_of(installed / 'mmvssm')
    mim = installed / 'mmvssm' / '.mim'
    for name in LINKED:
        assert not (mim / name).is_symlink()
    for folder in ('configs', 'tools'):
        assert files_of(mim / folder) == files_of(ROOT / folder)
        for name in files_of(ROOT / folder):
            assert (mim / folder / name).read_bytes() == (
                ROOT / folder / name
            ).read_bytes()


def test_wheel_holds_nothing_else(installed):
    names = {path.name for path in installed.iterdir()}
    assert names == {'mmvssm', f'mmvssm-{mmvssm.__version__}.dist-info'}
    assert not list(installed.rglob('*.pyc'))


def test_wheel_built_from_the_sdist_is_the_same(wheel, source, tmp_path):
    for name in ('sdist', 'unpacked', 'wheel'):
        (tmp_path / name).mkdir()
    sdist = build('sdist', source, tmp_path / 'sdist')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / 'unpacked', filter='data')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    assert {
        path.name for path in (ROOT / KERNELS).parent.iterdir() if path.suffix != '.so'
    } - {'__pycache__'} == {path.name for path in (unpacked / KERNELS).parent.iterdir()}
    again = build('wheel', unpacked, tmp_path / 'wheel', CXXFLAGS=CXXFLAGS)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())


@pytest.mark.skipif(
    nvrtc.find_library() is None, reason='pip install nvidia-cuda-nvrtc'
)
def test_wheel_compiles_its_cuda_kernels_without_nvcc(installed, tmp_path):
    """All of them, where there is no compiler on the path and nothing kept."""
    output = run(
        *('-m', 'ops.cuda_kernels'),
        cwd=ROOT / 'tests',
        PYTHONPATH=str(installed),
        MMVSSM_CACHE_DIR=str(tmp_path),
        **dict.fromkeys(('PATH', 'CUDACXX', 'CUDA_HOME', 'CUDA_PATH'), ''),
    )
    folder = installed / 'mmvssm' / 'ops' / 'cuda'
    assert set(output.split()) == set(map(str, folder.glob('*.cu')))
    assert {path.name for path in folder.iterdir() if path.suffix != '.py'} == {
        path.name for path in nvrtc.FOLDER.iterdir() if path.suffix in ('.cu', '.h')
    }
    assert list(tmp_path.rglob('*.cubin'))


def test_checkout_without_symbolic_links_gets_copies(source):
    mim = source / 'mmvssm' / '.mim'
    for name in LINKED:
        (mim / name).unlink()
        (mim / name).write_text(f'../../{name}')
    version = run('setup.py', '--version', cwd=source).split()[-1]
    assert version == mmvssm.__version__
    assert files_of(mim / 'configs') == files_of(ROOT / 'configs')
    assert files_of(mim / 'tools') == files_of(ROOT / 'tools')
    index = (ROOT / 'model-index.yml').read_text()
    assert (mim / 'model-index.yml').read_text() == index


@needs_compiler
def test_wheel_holds_kernels_for_any_python(wheel, installed, tmp_path):
    assert wheel.name.split('-')[2:4] == ['py3', 'none']
    code = """
import torch
from mmvssm.ops import selective_scan
from mmvssm.ops.cpu import library
u, delta, B, C = torch.rand(4, 1, 3, 70)
A = -torch.rand(3, 3)
want = selective_scan(u, delta, A, B, C, backend='reference')
with library.use_isa('baseline'):
    got = selective_scan(u, delta, A, B, C, backend='cpu')
    print(torch.allclose(got, want), library.lanes(), library._library()._name)
"""
    output = run('-c', code, cwd=tmp_path, PYTHONPATH=str(installed))
    # Four floats: the machine's own instruction set is not in the baseline.
    assert output.split() == ['True', '4', str(installed / KERNELS)]


def test_install_without_compiler_scans_in_plain_torch(source, tmp_path):
    target = tmp_path / 'wheel'
    output = run('-c', BUILD.format('wheel', str(target)), cwd=source, **NO_COMPILER)
    assert 'warning' in output and 'there is no C++ compiler' in output
    with zipfile.ZipFile(next(target.iterdir())) as archive:
        archive.extractall(tmp_path / 'site')
    code = """
import torch
from mmvssm.ops import choose_backend
print(choose_backend('cpu', torch.float32))
try:
    choose_backend('cpu', torch.float32, 'cpu')
except RuntimeError as error:
    print(error)
"""
    output = run('-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path / 'site'))
    chosen, reason = output.split('\n', 1)
    assert chosen == 'torch'
    assert 'not compiled when mmvssm was installed' in reason


@pytest.mark.parametrize(
    'environment,reason',
    [
        (NO_COMPILER, 'there is no C++ compiler'),
        (dict(CXX='/nowhere/c++'), "No such file or directory: '/nowhere/c++'"),
        (dict(CXX='false'), 'false failed'),
    ],
)
def test_failed_compilation_warns_or_is_an_error(source, environment, reason):
    old = source / KERNELS
    old.touch()
    for required in ('', '1'):
        environment = environment | dict(MMVSSM_REQUIRE_KERNELS=required)
        output = run(
            *('setup.py', 'build_ext', '--inplace'),
            cwd=source,
            succeeds=not required,
            **environment,
        )
        assert ('error: ' if required else 'warning: ') in output
        assert reason in output and 'install mmvssm again' in output
        assert not old.exists(), 'a library of older sources would be loaded'


@pytest.mark.skipif(
    os.environ.get('MMVSSM_REQUIRE_KERNELS', '0') in ('', '0'),
    reason='MMVSSM_REQUIRE_KERNELS is not set (continuous integration sets it)',
)
def test_required_kernels_can_run():
    assert backend_status()['cpu'] is None


def test_editable_install_compiles_beside_the_sources(source, fake_compiler, tmp_path):
    compiler, _ = fake_compiler
    build('editable', source, tmp_path / 'wheel', CXX=str(compiler))
    assert (source / KERNELS).exists()


def test_strict_editable_install_without_compiler(source, tmp_path):
    code = BUILD.format('editable', str(tmp_path / 'wheel'))
    code = code.replace(')', ", {'editable_mode': 'strict'})")
    assert 'there is no C++ compiler' in run('-c', code, cwd=source, **NO_COMPILER)
    assert list((tmp_path / 'wheel').iterdir())


def test_edited_header_is_compiled(source, fake_compiler):
    compiler, log = fake_compiler

    def compile_kernels():
        log.write_text('')
        run('setup.py', 'build_ext', cwd=source, CXX=str(compiler))
        return log.read_text().count('kernels.cpp')

    assert compile_kernels() == 3
    assert compile_kernels() == 0
    header = source / 'mmvssm' / 'ops' / 'cpu' / 'vec.h'
    later = time.time() + 3600
    os.utime(header, (later, later))
    assert compile_kernels() == 3


def test_flags_of_the_user_spare_the_instruction_sets(source, fake_compiler):
    compiler, log = fake_compiler
    flags = dict(CFLAGS='-O2 -march=native', CXXFLAGS='-g', LDFLAGS='-Wl,-s')
    run('setup.py', 'build_ext', cwd=source, CXX=f'{compiler} --wrapped', **flags)
    _, *compiled, linked = map(str.split, log.read_text().splitlines())
    assert {line[0] for line in compiled} == {'--wrapped'}
    assert linked[-1] == '-Wl,-s' and '-shared' in linked
    for line in compiled:
        assert '-g' in line and '-O3' in line and '-O2' not in line
    isas = {
        flag.partition('=')[2]: [flag for flag in line if flag.startswith('-m')]
        for line in compiled
        for flag in line
        if flag.startswith('-DMMVSSM_ISA=')
    }
    assert isas['baseline'] == ['-march=native', '-march=x86-64']
    assert isas['avx2'] == isas['baseline'] + ['-mavx2', '-mfma']
    assert isas['avx512'][: len(isas['avx2'])] == isas['avx2']


def test_installed_package_finds_its_own_configs(installed, tmp_path):
    (tmp_path / 'config.py').write_text("_base_ = 'mmvssm::upernet_vmamba_t.py'\n")
    code = (
        'import mmvssm\n'
        'from mmengine.config import Config\n'
        "print(Config.fromfile('config.py').model.backbone.type, mmvssm.__file__)\n"
    )
    output = run('-c', code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert output.split() == ['mmvssm.VSSM', str(installed / 'mmvssm/__init__.py')]


def test_installed_train_script_starts(installed, tmp_path):
    pytest.importorskip('mmseg')
    script = installed / 'mmvssm' / '.mim' / 'tools' / 'train.py'
    output = run(script, '-h', cwd=tmp_path, PYTHONPATH=str(installed))
    assert '--work-dir' in output


@pytest.mark.skipif(
    not is_installed('onedl-mim'),
    reason='onedl-mim is not installed (openmim finds no editable install)',
)
def test_mim_runs_the_train_script_with_the_config(tmp_path):
    config = ROOT / 'configs' / 'upernet_vmamba_t.py'
    code = f"""
import subprocess
from mim.commands.train import train
subprocess.check_call = lambda command, **_: print(command) or 0
train('mmvssm', {str(config)!r}, gpus=0)
"""
    command = run('-c', code, cwd=tmp_path).splitlines()[-1]
    assert 'tools/train.py' in command
    assert str(config) in command
