"""The tools, with weights of the zoo that a server on this machine has."""

import os
import re
import shutil
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

import warm
from mmvssm import compat
from mmvssm.backbones import VSSM
from mmvssm.checkpoints.read import read_state_dict
from mmvssm.zoo import find
from tiny import REPO, write_ade, write_config
from toy import train_pair

pytest.importorskip('mmseg')

TOOLS = REPO / 'tools'
IMAGENET = 'vmamba_t_s1l8'
SEGMENTOR = 'upernet_vmamba_t'
# The name of a published config, so that its weights are found; nothing learns.
NAME = f'{SEGMENTOR}.py'
STILL = 'optim_wrapper = dict(optimizer=dict(lr=0.0, weight_decay=0.0))\n'
FROM_ZOO = (
    f"model['backbone']['init_cfg'] = dict(type='Pretrained', "
    f"checkpoint='mmvssm://{IMAGENET}')\n"
)


def offer(server, name, content, folder):
    """Put a file where the address of a row leads to."""
    torch.save(content, folder / 'offered.pth')
    path = urlsplit(find(name).url).path
    server.files[path] = (folder / 'offered.pth').read_bytes()


def segmentor(classes=150):
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    cfg = Config.fromfile(write_config_of_test(classes))
    torch.manual_seed(1)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def write_config_of_test(classes):
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp())
    return write_config(folder / 'built.py', folder, _classes(classes))


def _classes(number):
    return (
        f"model['decode_head']['num_classes'] = {number}\n"
        f"model['auxiliary_head']['num_classes'] = {number}\n"
    )


def published(model):
    """What mmengine saves of a model that is trained."""
    return dict(state_dict=model.state_dict(), meta=dict(epoch=1))


@pytest.fixture
def work(tmp_path):
    write_ade(tmp_path / 'ade')
    write_config(tmp_path / NAME, tmp_path / 'ade', STILL + FROM_ZOO)
    return tmp_path


@pytest.fixture
def imagenet(mirror, work):
    """Raw and averaged weights of a small backbone; what the server has."""
    torch.manual_seed(0)
    raw = VSSM(dict(depths=(1, 1, 1, 1), dims=8)).state_dict()
    raw = {key: value for key, value in raw.items() if 'outnorm' not in key}
    ema = {key: value + 1 for key, value in raw.items()}
    extra = {'classifier.head.weight': torch.zeros(1000, 64)}
    offer(mirror, IMAGENET, dict(model=raw | extra, model_ema=ema | extra), work)
    return dict(raw=raw, ema=ema)


def run(tool, *args, cwd, code=0):
    done = warm.run([TOOLS / tool, *args], cwd=cwd, env=dict(os.environ))
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    return output


def assert_backbone(path, wanted):
    found = read_state_dict(path)
    assert wanted
    for key, value in wanted.items():
        assert torch.equal(found[f'backbone.{key}'], value), key


@pytest.mark.parametrize('copy', ['raw', 'ema'])
def test_a_training_says_what_it_starts_from(copy, imagenet, mirror, work):
    more = [] if copy == 'raw' else ['--weights', 'ema']
    output = run('train.py', NAME, '--work-dir', 'out', *more, cwd=work)
    before, _, rest = output.partition('Iter(train) [1/2]')
    assert rest
    assert f'This training starts from mmvssm://{IMAGENET}' in before
    number = len(imagenet['raw'])
    (report,) = re.findall(r'loaded .* tensors of the model .*', output)
    assert report.startswith(f'loaded {number} of {number + 8} tensors')
    assert report in before
    taken, other = ('model', 'model_ema')[:: 1 if copy == 'raw' else -1]
    assert f'weights: {taken}; the file also holds {other}' in before
    assert 'new by design' in before and 'not used: classifier.* (1)' in before
    assert_backbone(work / 'out/iter_2.pth', imagenet[copy])
    assert len(mirror.requests) == 1


def test_from_scratch(imagenet, mirror, work):
    output = run('train.py', NAME, '--from-scratch', cwd=work)
    assert 'This training starts from random weights' in output
    assert not mirror.requests and 'loaded' not in output


def test_pretrained_replaces_it(imagenet, mirror, work):
    torch.save(imagenet['ema'], work / 'mine.pth')
    options = ('--pretrained', 'mine.pth', '--work-dir', 'out')
    output = run('train.py', NAME, *options, cwd=work)
    assert 'This training starts from mine.pth' in output
    assert not mirror.requests
    assert_backbone(work / 'out/iter_2.pth', imagenet['ema'])


def test_a_training_that_goes_on_needs_no_weights(imagenet, mirror, work):
    run('train.py', NAME, '--work-dir', 'out', cwd=work)
    mirror.files.clear()
    shutil.rmtree(work / 'cache')
    more = ('--resume', '--cfg-options', 'train_cfg.max_iters=3')
    output = run('train.py', NAME, '--work-dir', 'out', *more, cwd=work)
    assert 'Iter(train) [3/3]' in output and '[2/3]' not in output
    assert 'This training starts' not in output
    assert len(mirror.requests) == 1
    assert_backbone(work / 'out/iter_3.pth', imagenet['raw'])


def test_resume_from_the_first_start(imagenet, mirror, work):
    output = run('train.py', NAME, '--work-dir', 'out', '--resume', cwd=work)
    assert f'starts from mmvssm://{IMAGENET}, unless there is a checkpoint' in output
    assert_backbone(work / 'out/iter_2.pth', imagenet['raw'])


def test_data_and_weights_missing(mirror, tmp_path):
    config = REPO / 'configs' / NAME
    output = run('train.py', config, cwd=tmp_path, code=2)
    for said in (
        'images/training',
        'make quickstart',
        f'mmvssm://{IMAGENET}',
        str(tmp_path / 'cache'),
        '--from-scratch',
    ):
        assert said in output
    assert 'Traceback' not in output and not list(tmp_path.iterdir())
    # Data first: nothing is downloaded in vain.
    assert not mirror.requests


def test_weights_that_cannot_be_fetched(mirror, work):
    output = run('train.py', NAME, cwd=work, code=2)
    assert '404' in output and 'Traceback' not in output
    assert not (work / 'work_dirs').exists()


@pytest.mark.parametrize('by', ['flag', 'config'])
def test_fine_tuning_on_other_classes(by, mirror, work):
    source = segmentor()
    offer(mirror, SEGMENTOR, published(source), work)
    more = STILL + FROM_ZOO + _classes(2)
    options = []
    if by == 'config':
        more += f"load_from = 'mmvssm://{SEGMENTOR}'\n"
    else:
        options = ['--cfg-options', f'load_from=mmvssm://{SEGMENTOR}']
    write_config(work / 'mine.py', work / 'ade', more + _two_classes())
    output = run('train.py', 'mine.py', '--work-dir', 'out', *options, cwd=work)
    before = output.partition('Iter(train) [1/2]')[0]
    for head in ('decode_head', 'auxiliary_head'):
        assert f'{head}.conv_seg has 150 outputs in the file and 2' in before
    # Not the backbone's own, which would be overwritten.
    assert len(mirror.requests) == 1
    found, wanted = read_state_dict(work / 'out/iter_2.pth'), source.state_dict()
    for key, value in found.items():
        if 'conv_seg' in key:
            assert value.shape != wanted[key].shape
        elif 'running' not in key and 'tracked' not in key:
            assert torch.equal(value, wanted[key]), key


def _two_classes():
    return (
        "metainfo = dict(classes=('wall', 'building'))\n"
        'metainfo.update(palette=[[0, 0, 0], [9, 9, 9]])\n'
        'for loader in (train_dataloader, val_dataloader):\n'
        "    loader['dataset']['metainfo'] = metainfo\n"
        'test_dataloader = val_dataloader\n'
    )


WAYS = {
    'pretrained of the model': "model['pretrained'] = {0!r}",
    'pretrained of the backbone': "model['backbone']['pretrained'] = {0!r}",
    'the backbone': "model['backbone']['init_cfg'] = {1}",
    'the whole model': "model['init_cfg'] = {1}",
    'a head': "model['decode_head']['init_cfg'] = {2}",
    'load_from': 'load_from = {0!r}',
}


def write_way(work, way, source):
    init = f"dict(type='Pretrained', checkpoint={source!r})"
    head = f"dict(type='Pretrained', prefix='decode_head.', checkpoint={source!r})"
    line = WAYS[way].format(source, init, head)
    write_config(work / 'way.py', work / 'ade', f'{STILL}{line}\n')
    return 'way.py'


@pytest.mark.parametrize('way', WAYS)
def test_every_way_of_naming_weights(way, mirror, work):
    source = segmentor()
    offer(mirror, SEGMENTOR, published(source), work)
    path = write_way(work, way, f'mmvssm://{SEGMENTOR}')
    output = run('train.py', path, '--work-dir', 'out', cwd=work)
    assert re.search(r'loaded \d+ of \d+ tensors of ', output)
    part = 'decode_head.' if way == 'a head' else 'backbone.'
    found, wanted = read_state_dict(work / 'out/iter_2.pth'), source.state_dict()
    keys = [key for key in wanted if key.startswith(part) and 'running' not in key]
    keys = [key for key in keys if 'tracked' not in key]
    assert len(keys) > 5
    assert all(torch.equal(found[key], wanted[key]) for key in keys)


@pytest.mark.parametrize('way', WAYS)
def test_a_wrong_file_stops_every_way(way, work, mirror):
    torch.manual_seed(0)
    wrong = VSSM(dict(depths=(1, 1, 2, 1), dims=8)).state_dict()
    torch.save(dict(model=wrong), work / 'wrong.pth')
    output = run('train.py', write_way(work, way, 'wrong.pth'), cwd=work, code=2)
    assert 'wrong.pth' in output and 'Iter(train)' not in output
    assert 'Traceback' not in output


@pytest.fixture
def trained(mirror, work):
    """A segmentor's published file, and the same at a path."""
    source = segmentor()
    offer(mirror, SEGMENTOR, published(source), work)
    torch.save(published(source), work / 'same.pth')
    return source


def labels(folder):
    return np.asarray(Image.open(folder / '0_labels.png'))


def test_predictions_of_the_published_segmentor(trained, work, mirror, monkeypatch):
    """The same by infer.py, mmseg's inferencer and plain PyTorch."""
    import mmcv
    from mmseg.apis import MMSegInferencer

    import mmvssm

    image = work / 'ade/images/validation/0.jpg'
    run('infer.py', image, '--config', NAME, '--out-dir', 'by name', cwd=work)
    assert len(mirror.requests) == 1
    options = ('--config', NAME, '--checkpoint', 'same.pth', '--out-dir', 'by path')
    run('infer.py', image, *options, cwd=work)
    found = labels(work / 'by name')
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, labels(work / 'by path'))
    # As if the package had shipped this config.
    monkeypatch.setattr(compat, '_CONFIGS', work)
    inferencer = MMSegInferencer(SEGMENTOR, device='cpu')
    assert inferencer.model.dataset_meta['classes'][0] == 'wall'
    np.testing.assert_array_equal(inferencer(str(image))['predictions'], found)
    # And by hand.
    net = segmentor().eval()
    report = mmvssm.load_checkpoint(net, f'mmvssm://{SEGMENTOR}', strict=True)
    assert not report.missing and not report.unexpected
    pixels = mmcv.imresize(mmcv.imread(str(image)), (64, 64))[..., ::-1]
    mean, std = net.data_preprocessor.mean, net.data_preprocessor.std
    inputs = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) - mean) / std
    with torch.no_grad():
        logits = net.encode_decode(inputs[None], [dict(img_shape=(64, 64))])
    resized = torch.nn.functional.interpolate(logits, found.shape, mode='bilinear')
    np.testing.assert_array_equal(resized.argmax(1)[0].numpy(), found)


def test_evaluation_of_the_published_segmentor(trained, work, mirror):
    by_name = run('test.py', NAME, '--work-dir', 'tested', cwd=work)
    by_path = run('test.py', NAME, 'same.pth', '--work-dir', 'again', cwd=work)
    (found, wanted) = (re.findall(r'mIoU: +(\S+)', x) for x in (by_name, by_path))
    assert found and found == wanted
    assert len(mirror.requests) == 1
    assert re.search(rf'loaded all \d+ tensors .* mmvssm://{SEGMENTOR}', by_name)


def test_addresses_of_hugging_face(imagenet, mirror, work):
    raw = {f'backbone.{key}': value for key, value in imagenet['raw'].items()}
    source = segmentor().state_dict()
    torch.save(dict(state_dict=source | raw), work / 'mine.pth')
    data = (work / 'mine.pth').read_bytes()
    mirror.files['/me/mine/resolve/main/mine.pth'] = data
    name = 'hf://me/mine/mine.pth'
    for way in ('--pretrained', '--cfg-options'):
        given = name if way == '--pretrained' else f'load_from={name}'
        output = run('train.py', NAME, way, given, '--work-dir', 'out', cwd=work)
        assert f'This training starts from {name}' in output
        assert_backbone(work / 'out/iter_2.pth', imagenet['raw'])
    run('test.py', NAME, name, cwd=work)
    run('convert_checkpoint.py', name, 'converted.pth', cwd=work)
    assert len(mirror.requests) == 1


def test_without_published_weights(work):
    write_config(work / 'mine.py', work / 'ade')
    output = run('test.py', 'mine.py', cwd=work, code=2)
    assert 'no weights were published for mine' in output


def test_convert_by_name(imagenet, work):
    target = work / 'converted.pth'
    options = (f'mmvssm://{IMAGENET}', target, '--weights', 'ema')
    run('convert_checkpoint.py', *options, cwd=work)
    found = read_state_dict(target)
    assert all(torch.equal(found[k], v) for k, v in imagenet['ema'].items())


@pytest.mark.parametrize('strategy', ['', "dict(type='mmvssm.FSDPStrategy')"])
def test_two_processes_download_once_and_report_once(strategy, imagenet, mirror, work):
    more = STILL + FROM_ZOO + (f'strategy = {strategy}\n' if strategy else '')
    write_config(work / NAME, work / 'ade', more)
    variables = dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    logs = train_pair(work, NAME, '--work-dir', 'out', **variables)
    assert [code for code, _ in logs] == [0, 0], logs[0][1][-3000:]
    reports = [re.findall(r'loaded \d+ of \d+ tensors', log) for _, log in logs]
    assert sorted(map(len, reports)) == [0, 1]
    assert len(mirror.requests) == 1
    assert_backbone(work / 'out/iter_2.pth', imagenet['raw'])
