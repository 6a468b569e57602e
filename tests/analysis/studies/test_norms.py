import numpy as np
import pytest
import torch
from PIL import Image

from mmvssm.analysis.studies.norms import find_checkpoints
from mmvssm.analysis.studies.subjects import parse_subjects
from studies import analyze, results_of, write_segmentor

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return write_segmentor(tmp_path_factory.mktemp('configs'), 'vim')


def test_numbers_and_masks(config, tmp_path, monkeypatch):
    """Those of the file are what the definitions say of the model's own norms."""
    rng = np.random.default_rng(0)
    (tmp_path / 'images').mkdir()
    for name in 'ab':
        pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'images/{name}.png')
        mask = np.zeros((64, 96), np.uint8)
        mask[:, :32] = 7
        (tmp_path / 'masks').mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f'masks/{name}.png')
    command = ['norms', '--models', config, '--images', tmp_path / 'images']
    command += ['--masks', tmp_path / 'masks', '--size', 64, 96, '--out-dir', tmp_path]
    command += ['--cutoff-ratio', 1.2, '--num-pictures', 0, '--layers', 3]
    assert analyze(monkeypatch, *command) == 0
    found = results_of(tmp_path, 'norms')['results']['vim']
    assert found['layers'] == ['0', '1', '2', '3']

    (subject,) = parse_subjects([str(config)])
    model = subject.build()
    streams = []
    model.backbone.layers[2].register_forward_hook(
        lambda module, inputs, output: streams.append(output[0] + output[1])
    )
    for name in 'ab':
        with Image.open(tmp_path / f'images/{name}.png') as picture:
            images = model.prepare(np.asarray(picture))
        with torch.no_grad():
            model.backbone(images)
    norms = torch.cat(streams).norm(dim=2).view(2, 4, 6).double()
    median = sorted(norms.flatten().tolist())[23]
    expected = dict(
        median=median,
        mean=norms.mean().item(),
        max=norms.max().item(),
        cutoff=1.2 * median,
        outlier_share=(norms > 1.2 * median).double().mean().item(),
        mean_inside=norms[:, :, :2].mean().item(),
        mean_outside=norms[:, :, 2:].mean().item(),
    )
    for key, value in expected.items():
        assert found[key][2] == pytest.approx(value, rel=1e-4), key


def test_over_a_training(config, tmp_path, monkeypatch):
    (subject,) = parse_subjects([str(config)])
    work = tmp_path / 'work'
    work.mkdir()
    net = subject.build().net
    weight = net.backbone.patch_embed.proj.weight
    for step in (2, 4, 10):
        weight.data.mul_(2.0)
        torch.save(dict(state_dict=net.state_dict()), work / f'iter_{step}.pth')
    (work / 'best_mIoU_iter_3.pth').touch()
    assert [n for n, _ in find_checkpoints(work)] == [2, 4, 10]
    command = ['norms', '--models', config, '--work-dir', work, '--every', 4]
    command += ['--size', 32, '--num-images', 1, '--out-dir', tmp_path]
    assert analyze(monkeypatch, *command) == 0
    found = results_of(tmp_path, 'norms')['results']['vim']
    assert (found['unit'], found['steps']) == ('iteration', [0, 4])
    before, after = (one['median'][0] for one in found['norms'])
    assert after > 2 * before
    assert (tmp_path / 'norms_training.png').is_file()
