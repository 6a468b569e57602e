"""The tools with a detector, run as their users run them."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

import warm
from mmvssm import compat
from mmvssm.checkpoints.read import read_state_dict
from tiny import REPO
from tiny_det import needs_detection, write_coco, write_config
from toy import train_pair

TOOLS = REPO / 'tools'
# A picture of each kind that a folder of photographs may hold.
PICTURES = {
    'rgb.jpg': Image.new('RGB', (70, 50), (90, 10, 30)),
    'grey.png': Image.effect_noise((64, 48), 90),
    'alpha.png': Image.new('RGBA', (48, 64), (9, 200, 30, 128)),
    'palette.png': Image.new('P', (40, 40), 3),
    'one_high.png': Image.new('RGB', (33, 1), (200, 0, 0)),
    'one_wide.png': Image.new('RGB', (1, 50), (200, 0, 0)),
    'long.png': Image.new('RGB', (900, 1), (0, 200, 0)),
}


def run(tool, *args, cwd, code=0):
    done = warm.run([TOOLS / tool, *args], cwd=cwd)
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    return output


@pytest.mark.parametrize('absent', ['mmcv._ext', 'mmdet.models'])
def test_without_mmdet_one_line_says_what_to_install(absent, monkeypatch, capsys):
    config = REPO / 'configs/mask_rcnn_vmamba_t_1x.py'
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setattr(sys, 'argv', ['train.py', str(config)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / 'train.py'), run_name='__main__')
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count('\n') == 1
    assert 'make install-det' in said and 'onedl-mmdetection' in said


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detection')
    write_coco(folder / 'coco')
    write_config(folder / 'tiny.py', folder / 'coco')
    return folder


@pytest.fixture(scope='module')
def trained(work):
    """One epoch in bfloat16; the checkpoint."""
    output = run('train.py', 'tiny.py', '--work-dir', 'out', '--amp', cwd=work)
    losses = re.findall(r'loss: (\S+)', output)
    assert len(losses) == 2 and all(np.isfinite(float(loss)) for loss in losses)
    dumped = (work / 'out/tiny.py').read_text()
    assert 'Bf16OptimWrapper' in dumped and 'Float32RegionsHook' in dumped
    return work / 'out/epoch_1.pth'


def read_found(path):
    """Objects of infer.py's JSON as (category, score, box)."""
    return [
        (entry['category_number'], entry['score'], entry['bbox'])
        for entry in json.loads(path.read_text())
    ]


@pytest.fixture(scope='module')
def tested(work, trained):
    """What test.py writes for the first validation image."""
    run(
        *('test.py', 'tiny.py', trained, '--work-dir', 'tested'),
        *('--out', 'results', '--show-dir', 'shown'),
        cwd=work,
    )
    return [
        (entry['category_id'] - 1, entry['score'], entry['bbox'])
        for entry in json.loads((work / 'results/results.bbox.json').read_text())
        if entry['image_id'] == 1
    ]


def assert_same(found, wanted):
    # The order of equal scores is nobody's promise.
    found, wanted = sorted(found, key=str), sorted(wanted, key=str)
    assert len(found) == len(wanted) > 0
    assert [x[0] for x in found] == [x[0] for x in wanted]
    for index in (1, 2):
        np.testing.assert_allclose(
            [x[index] for x in found], [x[index] for x in wanted], atol=1e-4
        )


@needs_detection
def test_evaluation_writes_what_it_should(work, tested):
    assert tested
    assert len(list((work / 'shown').rglob('*.png'))) == 2
    masks = json.loads((work / 'results/results.segm.json').read_text())
    assert {'counts', 'size'} == set(masks[0]['segmentation'])
    (logged,) = (work / 'tested').glob('*/2*.json')
    assert 'coco/segm_mAP_50' in logged.read_text()


@needs_detection
def test_infer_finds_what_the_evaluation_found(work, trained, tested):
    image = work / 'coco/val2017/000000000001.jpg'
    run(
        *('infer.py', image, '--config', 'tiny.py', '--checkpoint', trained),
        *('--out-dir', 'seen'),
        cwd=work,
    )
    assert_same(read_found(work / 'seen/000000000001_objects.json'), tested)
    assert Image.open(work / 'seen/000000000001_overlay.png').size == (80, 64)
    first = json.loads((work / 'seen/000000000001_objects.json').read_text())[0]
    assert first['segmentation']['size'] == [64, 80]


@needs_detection
@pytest.mark.parametrize('by', ['path', 'name'])
def test_inferencer_of_mmdet_finds_the_same(work, trained, tested, by, monkeypatch):
    from mmdet.apis import DetInferencer

    model = str(work / 'tiny.py')
    if by == 'name':
        # As if the package had shipped it.
        monkeypatch.setattr(compat, '_CONFIGS', work)
        model = 'tiny'
    inferencer = DetInferencer(model, str(trained), device='cpu', show_progress=False)
    image = work / 'coco/val2017/000000000001.jpg'
    (found,) = inferencer(str(image), no_save_vis=True)['predictions']
    found = [
        (label, score, [left, top, right - left, bottom - top])
        for label, score, (left, top, right, bottom) in zip(
            found['labels'], found['scores'], found['bboxes']
        )
    ]
    assert_same(found, tested)


@needs_detection
def test_pictures_of_any_kind(work, trained):
    folder = work / 'photos'
    folder.mkdir()
    for name, picture in PICTURES.items():
        picture.save(folder / name)
    whole = (folder / 'rgb.jpg').read_bytes()
    (folder / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'text.png').write_text('no image')
    output = run(
        *('infer.py', 'photos', 'absent.png', '--config', 'tiny.py'),
        *('--checkpoint', trained, '--out-dir', 'any'),
        cwd=work,
        code=1,
    )
    skipped = set(re.findall(r'skipped (\S+):', output))
    assert skipped == {
        'photos/cut.jpg',
        'photos/text.png',
        'photos/long.png',
        'absent.png',
    }
    assert 'Resize cannot take an image of 900x1 pixels' in output
    for name, picture in PICTURES.items():
        if f'photos/{name}' not in skipped:
            painted = Image.open(work / f'any/{name.split(".")[0]}_overlay.png')
            assert painted.size == picture.size


@needs_detection
def test_training_on_damaged_data_names_the_file(work, tmp_path):
    root = write_coco(tmp_path / 'coco', train=1)
    image = root / 'train2017/000000000001.jpg'
    image.unlink()
    write_config(tmp_path / 'tiny.py', root)
    (root / 'train2017/other.jpg').write_bytes(b'')
    done = warm.run([TOOLS / 'train.py', 'tiny.py'], cwd=tmp_path)
    assert done.returncode and str(image) in done.stderr


@needs_detection
def test_objects_outside_the_crop(tmp_path):
    """Large-scale jitter over images whose objects it mostly cuts off."""
    from mmengine.config import Config
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS

    from tiny_det import build, total_loss

    root = write_coco(tmp_path / 'coco', train=8)
    path = write_config(
        tmp_path / 'tiny.py', root, 'cascade_mask_rcnn_vim_t_lsj_100ep.py'
    )
    cfg = Config.fromfile(path)
    jitter = Config.fromfile(REPO / 'configs/_base_/datasets/coco_instance_lsj.py')
    pipeline = jitter.train_pipeline
    for step in pipeline:
        if step.type == 'RandomResize':
            step.update(scale=(96, 96), ratio_range=(2.0, 4.0))
        if step.type == 'RandomCrop':
            step.crop_size = (24, 24)
    model = build(cfg)
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, pipeline=pipeline))
    np.random.seed(0)
    samples = [dataset[i] for i in range(8)]
    counts = [len(sample['data_samples'].gt_instances) for sample in samples]
    assert counts.count(0) >= 2
    data = model.data_preprocessor(pseudo_collate(samples), True)
    loss = total_loss(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_detection
def test_two_processes(work):
    """With DDP's default flags, which a parameter without gradient would stop."""
    options = ('tiny.py', '--work-dir', 'two')
    for code, log in train_pair(
        work, *options, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''
    ):
        assert code == 0, log[-3000:]
    assert 'find_unused_parameters=True' not in (work / 'two/tiny.py').read_text()
    assert (work / 'two/epoch_1.pth').is_file()


@needs_detection
def test_foreign_checkpoint_is_refused(work, trained):
    import torch

    state = read_state_dict(trained)
    del state['roi_head.mask_head.conv_logits.weight']
    torch.save(dict(state_dict=state), work / 'headless.pth')
    output = run('test.py', 'tiny.py', 'headless.pth', cwd=work, code=2)
    assert 'first misfit: roi_head.mask_head.conv_logits.weight' in output


@needs_detection
def test_tta_is_refused_in_one_message(work, trained):
    output = run('test.py', 'tiny.py', trained, '--tta', cwd=work, code=2)
    assert 'mmdet cannot merge' in output and 'Traceback' not in output


@needs_detection
def test_get_flops(work):
    output = run('get_flops.py', 'tiny.py', '--shape', 64, 96, cwd=work)
    assert re.search(r'FLOPs +\d+\.\d\d G', output) and 'roi_head' in output
