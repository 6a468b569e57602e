"""The package as users install it: imports, wheel contents, mim's look-ups."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from mmengine.utils import is_installed

import mmvssm

ROOT = Path(__file__).resolve().parents[1]
LINKED = ('configs', 'tools', 'model-index.yml')
BUILT = ('mmvssm', 'pyproject.toml', 'setup.py', 'MANIFEST.in', 'LICENSE', 'README.md')
JUNK = shutil.ignore_patterns('__pycache__', '*.pyc')

# Run before the code under test: these packages cannot be imported.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Block())
"""


def run(*arguments, cwd=ROOT, **environment):
    """Run this Python in a process; its output is the failure message."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_source(target):
    """Copy what a package is built from, links as links."""
    for name in BUILT + LINKED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=JUNK)
        elif source.exists():
            shutil.copy(source, target / name)


def build(kind, source, target):
    """Build a 'wheel' or an 'sdist' without network; return its path."""
    code = f'from setuptools.build_meta import build_{kind} as b; b({str(target)!r})'
    run('-c', code, cwd=source)
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
    return build('wheel', source, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's contents, as site-packages would hold them."""
    target = tmp_path_factory.mktemp('site')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.mark.parametrize(
    'names',
    [
        ('mmcv', 'mmseg', 'mmdet'),
        ('mmcv', 'mmseg', 'mmdet', 'cv2', 'mamba_ssm', 'skimage', 'timm'),
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
    assert files_of(ROOT / 'mmvssm') - files_of(installed / 'mmvssm') == set()
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


def test_wheel_built_from_the_sdist_is_the_same(wheel, tmp_path):
    for name in ('source', 'sdist', 'unpacked', 'wheel'):
        (tmp_path / name).mkdir()
    copy_source(tmp_path / 'source')
    sdist = build('sdist', tmp_path / 'source', tmp_path / 'sdist')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / 'unpacked', filter='data')
    (source,) = (tmp_path / 'unpacked').iterdir()
    again = build('wheel', source, tmp_path / 'wheel')
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert sorted(one.namelist()) == sorted(two.namelist())


def test_checkout_without_symbolic_links_gets_copies(tmp_path):
    copy_source(tmp_path)
    mim = tmp_path / 'mmvssm' / '.mim'
    for name in LINKED:
        (mim / name).unlink()
        (mim / name).write_text(f'../../{name}')
    version = run('setup.py', '--version', cwd=tmp_path).split()[-1]
    assert version == mmvssm.__version__
    assert files_of(mim / 'configs') == files_of(ROOT / 'configs')
    assert files_of(mim / 'tools') == files_of(ROOT / 'tools')
    index = (ROOT / 'model-index.yml').read_text()
    assert (mim / 'model-index.yml').read_text() == index


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
