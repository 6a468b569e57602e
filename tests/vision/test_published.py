"""A name of the zoo is enough to evaluate a published classifier, as published."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import mmvssm
import warm
from mmvssm import zoo
from tiny import REPO

NAME = 'vim_t'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """The file of the smallest model in the zoo's cache, and two images of ImageNet."""
    work = tmp_path_factory.mktemp('published')
    rng = np.random.default_rng(0)
    (work / 'imagenet/val').mkdir(parents=True)
    (work / 'imagenet/meta').mkdir()
    lines = []
    for i, (size, label) in enumerate([((7, 5), 3), ((4, 9), 999)]):
        small = rng.integers(0, 256, (*size, 3), np.uint8)
        image = Image.fromarray(small).resize((60 * size[1], 60 * size[0]))
        image.save(work / f'imagenet/val/{i}.JPEG')
        lines.append(f'{i}.JPEG {label}\n')
    (work / 'imagenet/meta/val.txt').write_text(''.join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMVSSM_CACHE_DIR', str(work / 'cache'))
        path = zoo.path_of(NAME)
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    net = mmvssm.build_classifier(NAME).eval()
    # The scores then depend on the image.
    net.classifier.head.weight.data *= 50
    state = net.state_dict().items()
    names = {
        k.removeprefix('backbone.').removeprefix('classifier.'): v for k, v in state
    }
    torch.save(dict(model=names), path)
    return work, net


def run(tool, *args, cwd):
    env = dict(IMAGENET_ROOT='imagenet', MMVSSM_CACHE_DIR='cache', OMP_NUM_THREADS='1')
    done = warm.run(
        [REPO / 'tools' / tool, *args], cwd=cwd, env={**os.environ, **env}, merge=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def expected(net, path):
    """Probabilities by the published evaluation: PIL alone, crop ratio 0.875."""
    image = Image.open(path).convert('RGB')
    width, height = image.size
    short = min(width, height)
    size = (int(256 * width / short), int(256 * height / short))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in image.size)
    image = image.crop((left, top, left + 224, top + 224))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        return net((x - mean) / std).softmax(1)[0]


def test_its_name_evaluates_it(work):
    folder, net = work
    log = run(
        *('test.py', NAME, '--out', 'predicted', '--work-dir', 'out'),
        *('--cfg-options', 'test_dataloader.num_workers=0'),
        'test_dataloader.persistent_workers=False',
        cwd=folder,
    )
    assert 'loaded all 415 tensors of the model from mmvssm://vim_t' in log
    assert 'accuracy/top1' in log and 'accuracy/top5' in log
    rows = json.loads((folder / 'predicted/predictions.json').read_text())
    assert [row['label'] for row in rows] == [3, 999]
    for row in rows:
        scores = expected(net, folder / row['image'])
        best = scores.topk(5)
        np.testing.assert_allclose(row['scores'], best.values.numpy(), rtol=1e-4)
        assert best.values[0] > 10 * scores.median()
        assert row['category_numbers'] == best.indices.tolist()
    report = json.loads((folder / 'out/classes.json').read_text())
    assert report['classes'][3]['name'].startswith('tiger shark')


def test_its_name_classifies_images(work):
    folder, net = work
    log = run('infer.py', 'imagenet/val', '--config', NAME, cwd=folder)
    assert '2 of 2 images classified' in log
    (first, *_) = json.loads((folder / 'outputs/0_classes.json').read_text())
    scores = expected(net, folder / 'imagenet/val/0.JPEG')
    assert first['category_number'] == int(scores.argmax())
