"""tools/export.py and tools/infer.py --onnx, run as their users run them."""

import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import warm
from export.models import classifier
from export.models import segmentor as upernet
from tiny import REPO, write_ade, write_config

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
onnxscript = pytest.importorskip('onnxscript')
pytest.importorskip('mmseg')

TOOLS = REPO / 'tools'
BLOCK = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'mmvssm', 'mmseg', 'mmengine', 'cv2'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Data, a config, and weights for it."""
    folder = tmp_path_factory.mktemp('export')
    write_ade(folder / 'ade')
    # Images keep their size of 64x80; by the other config they become 64x64.
    write_config(folder / 'tiny.py', folder / 'ade', WHOLE)
    write_config(folder / 'resized.py', folder / 'ade')
    run('save.py', cwd=folder, script=SAVE)
    return folder


WHOLE = """
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
test_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(type='ADE20KDataset', data_root='ade', pipeline=pipeline))
"""
SAVE = """
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.model import revert_sync_batchnorm
from mmvssm import engine
cfg = engine.load_config('tiny.py')
init_default_scope('mmseg')
torch.manual_seed(0)
model = revert_sync_batchnorm(MODELS.build(cfg.model))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
torch.save(dict(state_dict=model.state_dict()), 'tiny.pth')
"""


def run(tool, *args, cwd, code=0, script=None):
    command = ['-c', script] if script else [TOOLS / tool, *args]
    env = {k: v for k, v in os.environ.items() if k != 'ADE20K_ROOT'}
    done = warm.run(command, cwd=cwd, env=env | dict(OMP_NUM_THREADS='1'))
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    return output


def here(monkeypatch, *args):
    """Run tools/export.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / 'export.py'), run_name='__main__')
    return stop.value.code


@pytest.fixture(scope='module')
def segmentor(work):
    """The config's segmentor, for its images, and what the tool printed."""
    output = run(
        'export.py',
        *('tiny.py', '--checkpoint', 'tiny.pth', '--out', 'made/seg.onnx'),
        *('--size', 64, 80, '--dynamic', 'batch', '--normalise'),
        *('--images', 'ade/images/validation/0.jpg'),
        cwd=work,
    )
    return work / 'made' / 'seg.onnx', output


def test_what_is_printed(segmentor):
    file, output = segmentor
    assert 'tiny.py with tiny.pth, images of 64x80' in output
    assert re.search(r'seg\.onnx: \d+ nodes, \d+\.\d MiB', output)
    assert re.search(r'onnxruntime +random +3x3x64x80', output)
    assert re.search(r'onnxruntime +0\.jpg +1x3x64x80', output)
    assert re.search(r'one thread: pytorch \d+\.\d ms, onnxruntime \d', output)
    assert [path.name for path in file.parent.iterdir()] == ['seg.onnx']


def masks(work, name, *arguments):
    """Label maps of the validation images, and the names of all files."""
    images = 'ade/images/validation'
    run('infer.py', images, *arguments, '--out-dir', name, cwd=work)
    maps = [Image.open(work / name / f'{i}_labels.png') for i in (0, 1)]
    return maps, {path.name for path in (work / name).iterdir()}


def compare(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.getpalette() == b.getpalette()
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape == (64, 80)
        assert len(np.unique(b)) > 1
        assert (a != b).mean() <= 1e-3


def test_infer_gives_the_masks_of_pytorch(segmentor, work):
    arguments = ('--config', 'tiny.py', '--checkpoint', 'tiny.pth', '--device', 'cpu')
    want, files = masks(work, 'torch', *arguments)
    got, found = masks(work, 'onnx', '--onnx', segmentor[0])
    assert found == files
    assert found == {
        f'{i}_{kind}.png' for i in (0, 1) for kind in ('labels', 'overlay')
    }
    compare(got, want)


def test_logits_are_resized_as_mmseg_does(work):
    config = ('resized.py', '--checkpoint', 'tiny.pth')
    options = ('--out', 'logits.onnx', '--size', 64, '--task', 'logits')
    run('export.py', *config, *options, cwd=work)
    want, _ = masks(work, 'torch2', '--config', *config, '--device', 'cpu')
    got, _ = masks(work, 'onnx2', '--onnx', 'logits.onnx')
    compare(got, want)


def test_the_example_of_the_docs_needs_no_torch(segmentor, work, tmp_path):
    file, _ = segmentor
    text = (REPO / 'docs' / 'export.md').read_text()
    (code,) = re.findall(r'```python\n(import sys\n.*?)```', text, re.S)
    assert len(code.splitlines()) <= 30
    (tmp_path / 'segment.py').write_text(code)
    photo = work / 'ade/images/validation/0.jpg'
    done = subprocess.run(
        [sys.executable, '-c', BLOCK, 'segment.py', str(file), str(photo), 'mask.png'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    mask = Image.open(tmp_path / 'mask.png')
    assert mask.size == Image.open(photo).size
    assert 'classes' in done.stdout or len(np.unique(np.asarray(mask))) > 1


def test_a_difference_is_exit_code_1_and_no_file(work, monkeypatch, capsys):
    from mmvssm.export import aten

    op, right = onnxscript.opset18, aten.translations()
    wrong = {
        torch.ops.aten.gelu.default: lambda self, approximate='none': op.Relu(self)
    }
    monkeypatch.setattr(aten, 'translations', lambda: right | wrong)
    monkeypatch.chdir(work)
    arguments = ('--checkpoint', 'tiny.pth', '--out', 'no/x.onnx', '--size', 32)
    assert here(monkeypatch, 'tiny.py', *arguments, '--task', 'maps') == 1
    said = capsys.readouterr().out
    assert 'not written: onnxruntime at 1x3x32x32 (random) differs' in said
    assert 'first layer that differs is model.patch_embed.4' in said
    assert not list((work / 'no').iterdir())


def test_a_folder_of_save_pretrained(work, monkeypatch, capsys):
    import mmvssm

    net = mmvssm.build_backbone('vmamba_t_s1l8', out_indices=(0,))
    mmvssm.save_pretrained(net, work / 'saved')
    monkeypatch.chdir(work)
    arguments = ('saved', '--out', 'saved.onnx', '--size', 32, '40')
    assert here(monkeypatch, *arguments) == 0
    assert 'saved with saved, images of 32x40' in capsys.readouterr().out


@pytest.mark.parametrize(
    'args, said',
    [
        (['nothing'], 'nothing is neither a config (NAME.py)'),
        (['absent.py', '--from-scratch'], 'no config file at'),
        (['tiny.py'], 'no weights were published for tiny'),
        (['mambar_l', '--checkpoint', 'absent.pth'], 'absent.pth'),
        (['tiny.py', '--checkpoint', 'tiny.pth', '--from-scratch'], 'exclude'),
        (['tiny.py', '--from-scratch', '--task', 'logits', '--opset', 3], 'opset must'),
        (['tiny.py', '--from-scratch', '--images', 'absent/*.png'], 'no image in'),
        (['tiny.py', '--from-scratch', '--size', 1, 2, 3], '--size takes'),
        (
            ['tiny.py', '--from-scratch', '--form', 'unrolled', '--dynamic', 'size'],
            'has one size',
        ),
        (
            [REPO / 'configs/mask_rcnn_vmamba_t_1x.py', '--from-scratch'],
            'mmdeploy: export its backbone alone with --task maps',
        ),
        (['vim_t', '--from-scratch', '--cfg-options', 'depth=3'], 'does not take them'),
    ],
)
def test_mistakes_end_in_one_message(args, said, work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    if 'mask_rcnn' in str(args[0]):
        pytest.importorskip('mmdet')
        pytest.importorskip('mmcv._ext')
    assert here(monkeypatch, *args, '--out', 'mistake.onnx') == 2
    error = capsys.readouterr().err
    assert said in error and 'Traceback' not in error
    assert not list(work.glob('mistake*'))


def refused(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', ['infer.py', *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / 'infer.py'), run_name='__main__')
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_infer_refuses_files_that_are_no_segmentors(
    work, monkeypatch, capsys, tmp_path
):
    import onnx

    from mmvssm.export import to_onnx

    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 40)).save('x.png')
    to_onnx(classifier('mlla'), 'classifier.onnx', 32, rounds=0)
    said = refused(monkeypatch, capsys, 'x.png', '--onnx', 'classifier.onnx')
    assert 'is not of a segmentor' in said
    said = refused(monkeypatch, capsys, 'x.png', '--onnx', 'absent.onnx')
    assert 'no ONNX file at' in said
    (tmp_path / 'broken.onnx').write_text('no model')
    said = refused(monkeypatch, capsys, 'x.png', '--onnx', 'broken.onnx')
    assert 'onnxruntime cannot read broken.onnx' in said
    said = refused(
        *(monkeypatch, capsys, 'x.png', '--onnx', 'classifier.onnx'),
        *('--checkpoint', 'x.pth'),
    )
    assert 'weights and settings of its own' in said

    model = onnx.load('classifier.onnx')
    (entry,) = (e for e in model.metadata_props if e.key == 'mmvssm')
    pipeline = [dict(type='os.system', command='touch harm')]
    notes = json.loads(entry.value) | dict(classes=['a'], align_corners=False)
    notes['test_pipeline'] = pipeline
    entry.value = json.dumps(notes)
    onnx.save(model, 'hostile.onnx')
    said = refused(monkeypatch, capsys, 'x.png', '--onnx', 'hostile.onnx')
    assert "would build 'os.system'" in said and not os.path.exists('harm')


def test_infer_names_images_of_another_size(work, monkeypatch, capsys):
    from mmvssm.export import to_onnx

    monkeypatch.chdir(work)
    # Nothing is known of its classes.
    to_onnx(upernet('vmamba'), 'fixed.onnx', 32, rounds=0)
    arguments = ('ade/images/validation', '--onnx', 'fixed.onnx', '--out-dir', 'none')
    monkeypatch.setattr(sys, 'argv', ['infer.py', *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / 'infer.py'), run_name='__main__')
    output = capsys.readouterr().out
    assert stop.value.code == 1 and '0 of 2 images segmented' in output
    assert 'the file takes 32x32 pixels' in output and '--dynamic size' in output
