"""Checkpoints whose pickle would run code, given to every tool."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings

import mmengine.runner
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner, checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint

import mmvssm
from mmvssm import engine
from mmvssm.backbones import VSSM
from mmvssm.checkpoints import CheckpointError, trust, unpickle
from tiny import REPO, write_ade, write_config
from tiny_det import needs_detection, write_coco
from tiny_det import write_config as write_detector

pytest.importorskip('mmseg')

MMENGINE_LOADERS = {
    '': checkpoint.load_from_local,
    'http://': checkpoint.load_from_http,
    'https://': checkpoint.load_from_http,
}
ARCH = dict(depths=(1, 1, 1, 1), dims=8)


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with data and a config, and the process in it."""
    folder = tmp_path_factory.mktemp('hostile')
    write_ade(folder / 'ade')
    write_config(folder / 'tiny.py', folder / 'ade')
    return folder


@pytest.fixture
def trace(work, monkeypatch):
    """What is there once code of a file has run."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(unpickle, '_trusted', set())
    # The tools replace these, in this process.
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    for pattern, loader in MMENGINE_LOADERS.items():
        CheckpointLoader.register_scheme(pattern, loader, force=True)
    # It asks compilers for their versions.
    monkeypatch.setattr(mmengine.runner.runner, 'collect_env', dict)
    trace = work / 'trace'
    yield trace
    if trace.exists():
        trace.rmdir()


@pytest.fixture
def evil(trace):
    """Everything a training can go on from, and something that is called."""
    return write(trace.parent / 'evil.pth', Evil(os.mkdir, str(trace)))


def write(path, hidden, legacy=False):
    state = {f'backbone.{k}': v for k, v in VSSM(ARCH).state_dict().items()}
    content = dict(
        meta=dict(epoch=0, iter=1, hidden=hidden),
        state_dict=state,
        message_hub={},
        optimizer={},
    )
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def run(monkeypatch, capsys, tool, *args):
    """Run a tool in this process; its exit code and the last thing it said."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
    try:
        runpy.run_path(str(REPO / 'tools' / tool), run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
        # A message in the place of a code is printed by the interpreter.
        return code, capsys.readouterr().err + str(code)
    return 0, ''


INIT = 'model.backbone.init_cfg.type=Pretrained'
TOOLS = {
    'load_from': ('train.py', 'tiny.py', '--cfg-options', 'load_from=evil.pth'),
    'pretrained': ('train.py', 'tiny.py', '--pretrained', 'evil.pth'),
    'init_cfg': (
        *('train.py', 'tiny.py', '--cfg-options', INIT),
        'model.backbone.init_cfg.checkpoint=evil.pth',
    ),
    'init_cfg of a head': (
        *('train.py', 'tiny.py', '--cfg-options'),
        'model.decode_head.init_cfg.type=Pretrained',
        'model.decode_head.init_cfg.checkpoint=evil.pth',
    ),
    'resume': ('train.py', 'tiny.py', '--resume', 'evil.pth'),
    'test': ('test.py', 'tiny.py', 'evil.pth'),
    'infer': (
        *('infer.py', 'ade/images/validation', '--config', 'tiny.py'),
        *('--checkpoint', 'evil.pth'),
    ),
    'convert': ('convert_checkpoint.py', 'evil.pth', 'out.pth'),
}


@pytest.mark.parametrize('tool', TOOLS)
def test_every_tool_refuses_it(tool, evil, trace, monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, *TOOLS[tool])
    assert code and not trace.exists()
    assert 'evil.pth is refused: reading it would call' in said
    assert '--trust-checkpoint' in said and 'weights_only' not in said


@pytest.mark.parametrize('tool', ['pretrained', 'resume', 'test', 'convert'])
def test_torchs_advice_to_run_the_file_does_not_show(
    tool, evil, trace, monkeypatch, capfd
):
    """torch cannot read this protocol, and says to read the file in full."""
    content = dict(meta=dict(epoch=0, iter=1), state_dict=VSSM(ARCH).state_dict())
    torch.save(content, evil, pickle_protocol=4)
    monkeypatch.setattr(sys, 'argv', list(TOOLS[tool]))
    with pytest.raises(SystemExit, match='^2$'):
        runpy.run_path(str(REPO / 'tools' / TOOLS[tool][0]), run_name='__main__')
    out, err = capfd.readouterr()
    assert 'error: evil.pth' in err and 'Unsupported operand' in err
    assert not re.search('weights.only', out + err, re.IGNORECASE)


def test_resume_passes_over_it(evil, trace, monkeypatch, capsys):
    (trace.parent / 'out').mkdir(exist_ok=True)
    evil.replace(trace.parent / 'out/iter_1.pth')
    options = ('tiny.py', '--work-dir', 'out', '--resume', 'auto')
    code, said = run(monkeypatch, capsys, 'train.py', *options)
    assert code == 2 and not trace.exists()
    assert 'none of the 1 checkpoints' in said


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'call', [os.mkdir, shutil.rmtree, subprocess.Popen, eval], ids=lambda f: f.__name__
)
def test_installed_loaders_of_mmengine_and_mmseg_refuse_it(call, legacy, trace):
    from mmseg.apis import init_model

    engine.install_safe_loaders()
    trace.mkdir()
    path = write(trace.parent / 'evil.pth', Evil(call, str(trace)), legacy)
    for load in (
        lambda: load_checkpoint(VSSM(ARCH), str(path)),
        lambda: init_model('tiny.py', str(path), device='cpu'),
    ):
        with pytest.raises(CheckpointError, match=f'would call .*{call.__name__}'):
            load()
    assert trace.exists()


@needs_detection
def test_inferencers_of_mmdet_refuse_it(evil, trace):
    from mmdet.apis import DetInferencer, init_detector

    engine.install_safe_loaders()
    write_coco(trace.parent / 'coco')
    config = write_detector(trace.parent / 'det.py', trace.parent / 'coco')
    with pytest.raises(CheckpointError, match='is refused'):
        init_detector(str(config), str(evil), device='cpu')
    with pytest.raises(CheckpointError, match='is refused'):
        DetInferencer(str(config), str(evil), device='cpu', show_progress=False)
    assert not trace.exists()


def test_loaders_of_mmengine_are_its_own_until_then(evil, trace):
    """Importing the package makes no file of others' safer, nor refuses one."""
    assert engine and CheckpointLoader._schemes[''] is checkpoint.load_from_local
    try:
        load_checkpoint(VSSM(ARCH), str(evil))
    except CheckpointError as error:
        raise AssertionError('replaced by an import') from error
    except Exception:
        return  # torch refused it, as it does for OpenMMLab's original mmengine.
    assert trace.exists()


def small_run(**changes):
    """Somebody's own script: mmengine's runner and a config with our hooks."""
    cfg = Config.fromfile('one.py')
    cfg.update(work_dir='first', launcher='none')
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    cfg.train_cfg.max_iters = 1
    cfg.update(changes)
    warnings.simplefilter('ignore')
    return Runner.from_cfg(cfg)


@pytest.fixture
def one(trace):
    write_config(trace.parent / 'one.py', trace.parent / 'ade')
    assert CheckpointLoader._schemes[''] is checkpoint.load_from_local


@pytest.mark.parametrize('resume', [False, True])
def test_the_hook_has_mmengines_runner_refuse_it(resume, one, evil, trace):
    runner = small_run(work_dir='refusing', load_from='evil.pth', resume=resume)
    with pytest.raises(CheckpointError, match='is refused'):
        runner.train()
    assert not trace.exists()
    assert CheckpointLoader._schemes[''] is checkpoint.load_from_local


def test_config_inside_a_checkpoint_does_not_run(one, trace):
    """mmengine runs the older name of it when a training resumes."""
    small_run().train()
    content = torch.load('first/iter_1.pth', weights_only=True)
    content['meta']['config'] = f'import os\nos.mkdir({str(trace)!r})\n'
    torch.save(content, 'evil.pth')
    runner = small_run(work_dir='second', load_from='evil.pth', resume=True)
    runner.train()
    assert runner.iter == 1 and not trace.exists()


def test_what_is_trusted_runs(evil, trace, monkeypatch, capsys):
    options = ('evil.pth', 'out.pth', '--trust-checkpoint')
    code, said = run(monkeypatch, capsys, 'convert_checkpoint.py', *options)
    assert code == 0, said
    assert trace.exists()


def test_trust_names_files_and_folders(trace):
    write(trace.parent / 'mine.pth', Evil(os.mkdir, str(trace)))
    trust(trace.parent / 'other')
    with pytest.raises(CheckpointError, match='refused'):
        mmvssm.load_checkpoint(VSSM(ARCH), 'mine.pth')
    trust('.')
    mmvssm.load_checkpoint(VSSM(ARCH), 'mine.pth')
    assert trace.exists()


def test_training_trusts_what_it_starts_from(trace, monkeypatch):
    cfg = engine.load_config('tiny.py', ['load_from=a.pth'], work_dir='out')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='b.pth')
    engine.trust_checkpoints(cfg)
    assert unpickle.is_trusted('a.pth') and unpickle.is_trusted('b.pth')
    assert not unpickle.is_trusted('out/iter_1.pth')
    engine.enable_resume(cfg)
    monkeypatch.setattr(unpickle, '_trusted', set())
    engine.trust_checkpoints(cfg)
    assert unpickle.is_trusted('a.pth')
    assert unpickle.is_trusted('out/iter_1.pth')


def test_files_of_many_foreign_classes_and_of_themselves(trace):
    name = ''.join(f'cmodule{i}\nClass{i}\n0' for i in range(60))
    (trace.parent / 'many.pth').write_bytes(b'\x80\x02' + name.encode() + b'}.')
    loop = {}
    loop['model'] = loop
    torch.save(loop, 'loop.pth')
    for file in ('many.pth', 'loop.pth'):
        with pytest.raises(CheckpointError):
            mmvssm.load_checkpoint(VSSM(ARCH), file)
