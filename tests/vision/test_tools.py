"""A classifier through the tools: train, test, infer, check_data, get_flops."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmvssm
import warm
from tiny import REPO
from tiny_cls import CLASSES, build, write_config, write_folders


def run(tool, *args, cwd, code=0):
    done = warm.run(
        [REPO / 'tools' / tool, *args],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        merge=True,
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with data, a config and what it was trained to."""
    folder = tmp_path_factory.mktemp('classifier')
    write_folders(folder / 'data')
    write_config(folder / 'tiny.py', folder / 'data', 'train_cfg.update(max_epochs=2)')
    log = run('train.py', 'tiny.py', '--work-dir', 'out', cwd=folder)
    assert 'Epoch(val) [2][3/3]    accuracy/top1' in log
    return folder


@pytest.fixture(scope='module')
def tested(work):
    options = ('--work-dir', 'test', '--out', 'predicted', '--show-dir', 'shown')
    log = run('test.py', 'tiny.py', 'out/epoch_2.pth', *options, cwd=work)
    (metrics,) = work.glob('test/2*/*.json')
    return log, json.loads(metrics.read_text())


def test_report_on_classes(work, tested):
    log, metrics = tested
    report = json.loads((work / 'test/classes.json').read_text())
    assert [row['name'] for row in report['classes']] == list(CLASSES)
    assert [row['images'] for row in report['classes']] == [2, 2, 2]
    assert report['images'] == 6
    assert report['top1'] == pytest.approx(metrics['accuracy/top1'], abs=1e-3)
    shares = [row['right'] / row['images'] * 100 for row in report['classes']]
    assert [row['accuracy'] for row in report['classes']] == shares
    assert np.mean(shares) == pytest.approx(metrics['classes/mean_accuracy'])
    assert 'The classes with the least accuracy:' in log
    assert 'accuracy/top2' in metrics


def test_inference_agrees_with_the_test(work, tested):
    predicted = json.loads((work / 'predicted/predictions.json').read_text())
    assert len(predicted) == 6 and len(list(work.glob('shown/**/test_*.png'))) == 6
    log = run(
        *('infer.py', 'data/val', '--config', 'tiny.py'),
        *('--checkpoint', 'out/epoch_2.pth', '--out-dir', 'inferred'),
        cwd=work,
    )
    assert '6 of 6 images classified' in log
    by_image = {str(Path(row['image']).relative_to(work)): row for row in predicted}
    names = ('0', '1', '0_2', '1_2', '0_3', '1_3')
    for name, image in zip(names, sorted(by_image)):
        found = json.loads((work / f'inferred/{name}_classes.json').read_text())
        row = by_image[image]
        assert [x['category_number'] for x in found] == row['category_numbers']
        assert [x['category'] for x in found] == row['categories']
        np.testing.assert_allclose([x['score'] for x in found], row['scores'], 1e-5)
        assert f'{image}: {found[0]["category"]} (' in log
        with Image.open(work / f'inferred/{name}_overlay.png') as picture:
            assert picture.height > 200


FLIPPED = """
tta_pipeline = [
    *test_pipeline[:3],
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
        [dict(type='PackInputs')]])]
"""


def test_averages_over_flips(work, tested):
    """The scores are the mean of those of the image and of the flipped one."""
    write_config(work / 'tta.py', work / 'data', FLIPPED)
    more = 'for part in (val_dataloader, test_dataloader):\n'
    more += "    part['dataset'].update(pipeline=[*test_pipeline[:3], "
    more += "dict(type='RandomFlip', prob=1.0), dict(type='PackInputs')])\n"
    write_config(work / 'flipped.py', work / 'data', more)
    scores = {}
    for name, flags in (('tta', ['--tta']), ('flipped', [])):
        options = ('--work-dir', f'{name}_out', '--out', name)
        run('test.py', f'{name}.py', 'out/epoch_2.pth', *options, *flags, cwd=work)
    for name in ('predicted', 'tta', 'flipped'):
        rows = json.loads((work / name / 'predictions.json').read_text())
        order = [np.argsort(row['category_numbers']) for row in rows]
        scores[name] = [np.array(r['scores'])[o] for r, o in zip(rows, order)]
    mean = np.add(scores['predicted'], scores['flipped']) / 2
    np.testing.assert_allclose(scores['tta'], mean, rtol=1e-5)
    assert not np.allclose(scores['predicted'], scores['flipped'], rtol=1e-5)


def test_what_cannot_be_read_is_skipped(work):
    (work / 'broken.png').write_bytes(b'no image')
    (work / 'empty.png').write_bytes(b'')
    images = ('broken.png', 'empty.png', 'data/val/blob/0.png')
    log = run(
        *('infer.py', *images, '--config', 'tiny.py'),
        *('--checkpoint', 'out/epoch_2.pth', '--out-dir', 'some'),
        cwd=work,
        code=1,
    )
    assert '1 of 3 images classified' in log and 'skipped broken.png' in log
    assert 'skipped empty.png: the file is empty\n' in log


def test_it_can_be_exported(work):
    pytest.importorskip('onnx')
    log = run(
        *('export.py', 'tiny.py', '--checkpoint', 'out/epoch_2.pth'),
        *('--out', 'tiny.onnx'),
        cwd=work,
    )
    assert 'loaded all' in log and (work / 'tiny.onnx').stat().st_size


def test_the_checkpoint_is_the_packages_own(work):
    """It loads as it is, and is what the tools have run."""
    net = build()
    report = mmvssm.load_checkpoint(net, work / 'out/epoch_2.pth', strict=True)
    assert report.contents == 'classifier' and not report.missing
    saved = torch.load(work / 'out/epoch_2.pth', weights_only=False)
    assert saved['meta']['dataset_meta']['classes'] == CLASSES


def test_names_of_classes(work):
    """Without names in the data set or the checkpoint, classes have numbers."""
    torch.save(build().state_dict(), work / 'bare.pth')
    image = ('infer.py', 'data/val/blob/0.png', '--config', 'tiny.py', '--checkpoint')
    run(*image, 'bare.pth', '--out-dir', 'numbers', cwd=work)
    found = json.loads((work / 'numbers/0_classes.json').read_text())
    assert {x['category']: x['category_number'] for x in found} == {
        '0': 0,
        '1': 1,
        '2': 2,
    }
    named = "test_dataloader.dataset.metainfo=dict(classes=('a', 'b'))"
    log = run(*image, 'bare.pth', '--cfg-options', named, cwd=work, code=2)
    assert 'error: metainfo of the test data set has 2 classes, and the model' in log


def test_the_backbone_alone_can_be_loaded(work):
    options = ('--work-dir', 'started', '--pretrained', 'out/epoch_2.pth')
    log = run('train.py', 'tiny.py', *options, cwd=work)
    assert 'loaded 48 of 48 tensors of the model from a VMamba classifier' in log
    assert 'only in the file, not used: classifier.* (4)' in log


def test_a_checkpoint_of_another_model_is_refused(work):
    torch.save(dict(state_dict=build(num_classes=5).state_dict()), work / 'five.pth')
    log = run('test.py', 'tiny.py', 'five.pth', '--work-dir', 'no', cwd=work, code=2)
    assert 'error: five.pth does not belong to this config' in log
    torch.save(dict(model=build('vim').state_dict()), work / 'vim.pth')
    log = run('test.py', 'tiny.py', 'vim.pth', '--work-dir', 'no', cwd=work, code=2)
    assert 'does not belong to this config' in log


def test_fine_tuning_starts_from_it(work):
    """``load_from`` fills all but another number of classes, and says so."""
    classes = (*CLASSES, 'star')
    write_folders(work / 'more', classes, train=1, val=1)
    write_config(
        work / 'more.py', work / 'more', "load_from = 'out/epoch_2.pth'", num_classes=4
    )
    log = run('train.py', 'more.py', '--work-dir', 'tuned', cwd=work)
    assert 'loaded 50 of 52 tensors of the model from a VMamba classifier' in log
    assert 'has 3 outputs in the file and 4 in the model' in log


def test_counts(work):
    log = run('get_flops.py', 'tiny.py', '--shape', '32', cwd=work)
    number = sum(p.numel() for p in build().parameters())
    assert f'parameters  {number / 1e6:10.2f} M' in log
    log = run('get_flops.py', 'tiny.py', cwd=work)
    assert 'tiny.py at 224x224' in log


def test_data_are_looked_into(work):
    log = run('check_data.py', 'tiny.py', '--sheet', 'sheet.png', cwd=work)
    assert 'train: 12 images, 12 read' in log and 'nothing found' in log
    assert (work / 'sheet_train.png').is_file()


def test_weights_that_are_not_finite_are_refused(work):
    """A class whose score is NaN would be the best one of every image."""
    state = torch.load(work / 'out/epoch_2.pth', weights_only=False)
    key = next(k for k in state['state_dict'] if k.startswith('head.'))
    state['state_dict'][key].view(-1)[0] = float('nan')
    torch.save(state, work / 'nan.pth')
    given = ('--config', 'tiny.py', '--checkpoint', 'nan.pth', '--out-dir', 'nan')
    for command in (
        ('test.py', 'tiny.py', 'nan.pth', '--work-dir', 'nan'),
        ('infer.py', 'data/val', *given),
    ):
        log = run(*command, cwd=work, code=2)
        assert 'error: nan.pth holds NaN or infinite weights: head.' in log


@pytest.mark.parametrize('name', ('vmamba_t_s1l9', 'vim-t'))
def test_a_name_that_is_spelled_wrong(name, work):
    log = run('test.py', name, cwd=work, code=2)
    meant = {'vmamba_t_s1l9': 'vmamba_t_s1l8', 'vim-t': 'vim_t'}[name]
    assert f"{name!r} is no name of the zoo; did you mean '{meant}'" in log


NO_BATCH = 'train_dataloader has no batch'
MIXED = 'mixes each image with another one of its batch'


@pytest.mark.parametrize(
    ('more', 'words'),
    (
        ('train_dataloader.update(batch_size=99, drop_last=True)', NO_BATCH),
        ("optim_wrapper.update(type='AmpOptimWrapper')", 'train with --amp bfloat16'),
        (
            "train_dataloader['batch_size'] = 1\nmodel['data_preprocessor']."
            "update(type='mmvssm.ClsDataPreprocessor', mixup=0.8)",
            f'model.data_preprocessor.mixup {MIXED}',
        ),
        (
            "train_dataloader['batch_size'] = 1\n"
            "model['train_cfg'] = dict(augments=dict(type='CutMix', alpha=1.0))",
            f'CutMix of model.train_cfg.augments {MIXED}',
        ),
        (
            "train_dataloader['batch_size'] = 0",
            'train_dataloader.batch_size must be a whole number of 1 or more, not 0.',
        ),
        (
            "val_dataloader['num_workers'] = -1",
            'val_dataloader.num_workers must be a whole number of 0 or more, not -1.',
        ),
    ),
)
def test_trainings_that_would_not_do_what_they_say(more, words, work):
    if 'Amp' in more and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    write_config(work / 'bad.py', work / 'data', more)
    log = run('train.py', 'bad.py', '--work-dir', 'bad', cwd=work, code=2)
    assert words in log.splitlines()[-1]
