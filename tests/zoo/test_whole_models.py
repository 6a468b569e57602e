"""Segmentors and detectors by name, from files in the form of each training code."""

import json
import os
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from mmengine.config import Config

import tiny
import tiny_det
import warm
from mmvssm import compat, zoo
from mmvssm.engine import UsageError, is_detector, load_weights
from mmvssm.zoo import TABLE, find
from tiny import REPO
from tiny_det import needs_detection

pytest.importorskip('mmseg')

TRAINED = [row for row in TABLE.values() if row.kind != 'classifier' and row.url]
# One of each training code, small.
FORMATS = (
    'upernet_vmamba_t',
    'upernet_vmamba_v0_b',
    'upernet_mlla_b',
    'mask_rcnn_vmamba_t_3x',
    'mask_rcnn_vmamba_v0_s_1x',
    'mask_rcnn_mlla_t_1x',
)


def config_of(name, small):
    cfg = Config.fromfile(REPO / f'configs/{name}.py')
    if small:
        cfg = (tiny_det if is_detector(cfg) else tiny).shrink(cfg)
    return cfg


def build(cfg, seed):
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmdet' if is_detector(cfg) else 'mmseg')
    torch.manual_seed(seed)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            # Nothing may be as every model has it.
            if value.is_floating_point() and 'running_var' not in name:
                value.add_(torch.rand(()) * 0.1)
    return model


def published_file(name, state):
    """What the authors' training saved, with its names and what is beside them."""
    kind = find(name).model
    content = dict(optimizer=dict(state={}, param_groups=[]))
    if kind.startswith('mlla'):
        # mmseg 0.x and mmdet 2.x; a table of rotations in every attention.
        content['meta'] = dict(CLASSES=('a', 'b'), PALETTE=[[0, 0, 0], [1, 1, 1]])
        state = dict(state)
        state['backbone.layers.0.blocks.0.attn.rope.rotations'] = torch.zeros(3)
    else:
        content['meta'] = dict(dataset_meta=dict(classes=('a', 'b')))
    if kind.endswith('_v0'):
        state = {_first_published_name(key): value for key, value in state.items()}
    return dict(content, state_dict=state)


def _first_published_name(key):
    if not key.startswith('backbone.'):
        return key
    key = key.replace('patch_embed.0.', 'patch_embed.proj.')
    key = key.replace('patch_embed.2.', 'patch_embed.norm.')
    key = key.replace('.op.', '.self_attention.')
    return key.replace('.norm.', '.ln_1.') if '.blocks.' in key else key


def offer(server, name, content, folder):
    torch.save(content, folder / 'offered.pth')
    split = urlsplit(find(name).url)
    path = split.path + (f'?{split.query}' if split.query else '')
    server.files[path] = (folder / 'offered.pth').read_bytes()


def check(name, server, folder, small):
    cfg = config_of(name, small)
    state = {k: v.clone() for k, v in build(cfg, 1).state_dict().items()}
    content = published_file(name, state)
    assert name.find('_v0_') < 0 or not state.keys() >= content['state_dict'].keys()
    offer(server, name, content, folder)
    model = build(cfg, 2)
    load_weights(model, f'mmvssm://{name}')
    found = model.state_dict()
    for key, value in state.items():
        # No prediction uses it.
        if not key.startswith('auxiliary_head.'):
            assert torch.equal(found[key], value), key
    # mmengine's own ways, as its inferencers take them.
    from mmengine.runner import load_checkpoint

    again = build(cfg, 3)
    load_checkpoint(again, f'mmvssm://{name}', strict=not name.count('mlla'))
    for key, value in again.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert len(server.requests) == 1


@needs_detection
@pytest.mark.parametrize('name', FORMATS)
def test_every_format_loads_whole(name, mirror, tmp_path):
    check(name, mirror, tmp_path, small=True)


@needs_detection
@pytest.mark.long
@pytest.mark.parametrize('row', TRAINED, ids=lambda row: row.name)
def test_every_file_loads_whole(row, mirror, tmp_path):
    check(row.name, mirror, tmp_path, small=False)


def test_heads_of_another_config_are_refused(mirror, tmp_path):
    name = 'upernet_vmamba_t'
    cfg = config_of(name, small=True)
    state = build(cfg, 1).state_dict()
    offer(mirror, name, published_file(name, state), tmp_path)
    cfg.model.decode_head.num_classes = 3
    with pytest.raises(UsageError, match=r'conv_seg.*\(150, 16, 1, 1\) in the file'):
        load_weights(build(cfg, 2), f'mmvssm://{name}')


@pytest.fixture
def detector(mirror, tmp_path):
    """A folder with images, the config of a published detector, and its file."""
    name = 'mask_rcnn_vmamba_t_1x'
    tiny_det.write_coco(tmp_path / 'coco')
    path = tiny_det.write_config(tmp_path / f'{name}.py', tmp_path / 'coco')
    source = build(Config.fromfile(path), 1)
    offer(mirror, name, published_file(name, source.state_dict()), tmp_path)
    return tmp_path


@needs_detection
def test_predictions_of_a_published_detector(detector, mirror, monkeypatch):
    """The same by infer.py, test.py, mmdet's inferencer and plain PyTorch."""
    from mmdet.apis import DetInferencer

    name = 'mask_rcnn_vmamba_t_1x'
    image = detector / 'coco/val2017/000000000001.jpg'
    tool = [REPO / 'tools/infer.py', image, '--config', f'{name}.py']
    done = warm.run([*tool, '--out-dir', 'seen'], cwd=detector, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    text = (detector / 'seen/000000000001_objects.json').read_text()
    found = _sorted(
        (x['category_number'], x['score'], x['bbox']) for x in json.loads(text)
    )
    assert found

    monkeypatch.setattr(compat, '_CONFIGS', detector)
    inferencer = DetInferencer(name, device='cpu', show_progress=False)
    (seen,) = inferencer(str(image), no_save_vis=True)['predictions']
    _assert_same(found, _with_sizes(seen['labels'], seen['scores'], seen['bboxes']))

    # By hand, with the transforms of the test.
    import mmcv

    import mmvssm

    net = build(Config.fromfile(detector / f'{name}.py'), 2).eval()
    mmvssm.load_checkpoint(net, f'mmvssm://{name}', strict=True)
    pixels = mmcv.imread(str(image))
    resized, scale = mmcv.imrescale(pixels, (96, 64), return_scale=True)
    sample = tiny_det.batch(number=1, size=resized.shape[:2])
    sample['inputs'] = [torch.from_numpy(resized.copy()).permute(2, 0, 1)]
    sample['data_samples'][0].set_metainfo(
        dict(ori_shape=pixels.shape[:2], scale_factor=(scale, scale))
    )
    with torch.no_grad():
        (result,) = net.test_step(sample)
    result = result.pred_instances
    _assert_same(
        found,
        _with_sizes(
            *(getattr(result, k).tolist() for k in ('labels', 'scores', 'bboxes'))
        ),
    )
    assert len(mirror.requests) == 1


def _sorted(objects):
    return sorted(objects, key=str)


def _with_sizes(labels, scores, boxes):
    return _sorted(
        (label, score, [left, top, right - left, bottom - top])
        for label, score, (left, top, right, bottom) in zip(labels, scores, boxes)
    )


def _assert_same(found, wanted):
    assert [x[0] for x in found] == [x[0] for x in wanted]
    for index in (1, 2):
        np.testing.assert_allclose(
            [x[index] for x in found], [x[index] for x in wanted], atol=1e-3
        )


def test_models_without_weights_stay_without(monkeypatch):
    """An inferencer of a config without a file gets none, and mmengine warns."""
    import mmvssm.engine

    find_weights = mmvssm.engine._weights_of
    assert find_weights('upernet_vim_t') is find_weights('upernet_mlla_t') is None
    assert find_weights('upernet_mlla_b') == f'{zoo.SCHEME}upernet_mlla_b'
