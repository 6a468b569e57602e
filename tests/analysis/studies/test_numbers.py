"""The files say what the definitions say of a model's own outputs."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmvssm.analysis.receptive_field import receptive_field, squares_of
from mmvssm.analysis.studies.subjects import parse_subjects
from mmvssm.analysis.studies.tokens import pools_of
from studies import analyze, results_of, write_segmentor

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Mamba® with trained weights, which another seed has made, and an image."""
    path = tmp_path_factory.mktemp('numbers')
    config = write_segmentor(path, 'mambar')
    net = parse_subjects([str(config)])[0].build(seed=1).net
    torch.save(dict(state_dict=net.state_dict()), path / 'x.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(path / 'a.png')
    return path


@pytest.fixture
def model(folder):
    (subject,) = parse_subjects([f'{folder}/mambar.py={folder}/x.pth'])
    return subject.build()


@pytest.fixture
def images(folder, model):
    with Image.open(folder / 'a.png') as picture:
        return model.prepare(np.array(picture))


def study(name, folder, monkeypatch, *more):
    command = [name, '--models', f'{folder}/mambar.py={folder}/x.pth', '--images']
    command += [folder / 'a.png', '--size', 64, 96, '--out-dir', folder, *more]
    assert analyze(monkeypatch, *command) == 0
    return results_of(folder, name)['results']['mambar']


def last_output(model, images):
    """Local outputs (C, h, w) and registers (n, C) of the last block and the norm."""
    model.backbone.return_tokens = True
    with torch.no_grad():
        patches, tokens = model.backbone(images)[-1]
    return patches[0].double(), tokens[0].double()


def test_receptive_fields_before_and_after(folder, model, images, monkeypatch):
    found = study('erf', folder, monkeypatch)
    untrained = model.subject.build(trained=False)
    for state, one in (('before', untrained), ('after', model)):
        squares = squares_of(receptive_field(one.backbone, images))
        assert found[state]['sides'] == [square.side for square in squares]
        areas = [pytest.approx(square.area, rel=1e-4) for square in squares]
        assert found[state]['areas'] == areas
    assert found['before'] != found['after']


@pytest.mark.parametrize('distance', ['l2', 'cosine'])
def test_distances(distance, folder, model, images, monkeypatch):
    found = study('features', folder, monkeypatch, '--distance', distance)
    patches, tokens = last_output(model, images)
    target = tokens.mean(0)
    cells = patches.flatten(1).T
    if distance == 'l2':
        distances = (cells - target).square().sum(1).sqrt()
    else:
        lengths = cells.norm(dim=1) * target.norm()
        distances = 1 - cells @ target / lengths
    assert found['global_output'] == f'mean of {len(tokens)} extra tokens'
    assert found['mean'] == pytest.approx(distances.mean().item(), rel=1e-4)
    largest = (distances.max() / distances.mean()).item()
    assert found['max_over_mean'] == pytest.approx(largest, rel=1e-4)
    assert 'mean_inside' not in found


def test_registers(folder, model, images, monkeypatch):
    found = study('registers', folder, monkeypatch)
    patches, tokens = last_output(model, images)
    assert found['registers'] == len(tokens)
    (image,) = found['images']
    rows, columns = patches.shape[1:]
    for peak, mean, register in zip(image['peaks'], image['mean'], tokens):
        cells = patches.flatten(1).T
        cosines = cells @ register / (cells.norm(dim=1) * register.norm())
        assert mean == pytest.approx(cosines.mean().item(), abs=1e-5)
        k = int(cosines.argmax())
        place = [(k // columns + 0.5) / rows, (k % columns + 0.5) / columns]
        assert peak == pytest.approx(place, rel=1e-4)


def test_tokens_are_ranked_by_the_stream(model, images):
    streams = []
    model.backbone.layers[-1].register_forward_hook(
        lambda module, inputs, output: streams.append(output[0] + output[1])
    )
    patches, tokens = last_output(model, images)
    pools = pools_of(model, images)
    places = model.backbone.token_positions(patches[0].numel())
    local = [i for i in range(streams[0].shape[1]) if i not in places]
    norms = streams[0][0, local].norm(dim=1)
    first = int(norms.argmax())
    # One token is five per cent of 24.
    torch.testing.assert_close(pools['top_5'][0].double(), patches.flatten(1)[:, first])
    torch.testing.assert_close(pools['extra'][0].double(), tokens.flatten())
