"""What is measured of which models, and the accuracy that goes with it."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmvssm.analysis.measuring import steps
from mmvssm.analysis.studies import scaling
from mmvssm.analysis.studies.images import open_images
from mmvssm.analysis.studies.subjects import parse_subjects, published_accuracy
from mmvssm.engine import UsageError
from studies import analyze, results_of


class Brightness(torch.nn.Module):
    """A classifier of dark and bright images."""

    def __init__(self, size=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        mean = self.weight * images.mean((1, 2, 3))
        return torch.stack((-mean, mean), 1)


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Runs the study on a peer that is quick, and keeps the cases."""
    cases = []

    def measure(case, who, effort, longest, memory):
        cases.append((case, [contender.model for contender in who], memory))
        found = {
            contender.name: dict(images_per_second=1e6 / case.height**2)
            for contender in who
            if contender.model != 'slow'
        }
        left_out = {'slow, float32, eager': 'over 1 s a step'}
        return dict(contenders=found, left_out=left_out)

    monkeypatch.setattr(scaling, 'measure', measure)
    monkeypatch.setattr(scaling.probe, 'start', lambda models: None)
    for name in ('slow', 'quick'):
        monkeypatch.setitem(steps.PEERS, name, Brightness)

    def run(*args):
        command = ['scaling', '--out-dir', tmp_path, *args]
        assert analyze(monkeypatch, *command) == 0
        return results_of(tmp_path, 'scaling'), cases

    return run


def test_who_stops_it_keeps_the_sizes_that_are_done(job, tmp_path, monkeypatch):
    measure = scaling.measure

    def stop(case, *args):
        if case.height == 64:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(scaling, 'measure', stop)
    with pytest.raises(AssertionError, match='130'):
        job('--models', 'vim_t', '--size', 32, 48, 64, '--peers', 'quick')
    kept = results_of(tmp_path, 'scaling')['results']
    for label in ('vim_t', 'quick'):
        assert len(kept[label]['inference']['images_per_second']) == 2


def test_sizes_modes_and_models(job, tmp_path):
    sizes = ['--size', 64, 32, '32x64', 64]
    options = ['--peers', 'slow', '--train', '--batch', 2, '--threads', 1]
    found, cases = job('--models', 'vim_t', *sizes, *options)
    assert found['sizes'] == [[32, 32], [32, 64], [64, 64]]
    assert [(c.height, c.width, c.mode) for c, _, _ in cases] == [
        (height, width, mode)
        for height, width in ((32, 32), (32, 64), (64, 64))
        for mode in steps.MODES
    ]
    for case, who, memory in cases:
        assert (case.batch, case.threads, who, memory) == (2, 1, ['vim_t', 'slow'], 1)
    results = found['results']
    assert results['vim_t']['training']['left_out'] == [None] * 3
    assert results['slow']['inference']['left_out'] == ['over 1 s a step'] * 3
    assert results['slow']['inference']['images_per_second'] == [None] * 3
    assert results['vim_t']['parameters'] == 7_148_008
    # Patches of 16: 4, 8 and 16 of them and a class token.
    flops = results['vim_t']['flops']
    assert flops[1] / flops[0] == pytest.approx(9 / 5, rel=0.02)
    assert flops[2] / flops[0] == pytest.approx(17 / 5, rel=0.02)
    assert results['vim_t']['published_top1'] == 76.1
    assert results['vim_t']['accuracy'] is None
    assert (tmp_path / 'scaling.png').exists()
    assert not (tmp_path / 'scaling_scatter.png').exists()


def test_published_sizes(job, tmp_path):
    found, _ = job('--models', 'vim_t', '--peers', '--published', 'vim')
    assert [height for height, _ in found['sizes']] == [512, 640, 738, 1024, 1248]
    # Linear: 32², 40², 46², 64², 78² patches.
    flops = found['results']['vim_t']['flops']
    assert flops[-1] / flops[0] == pytest.approx(78**2 / 32**2, rel=0.02)
    job('--models', 'vim_t', '--peers', '--size', 224)
    assert (tmp_path / 'scaling_scatter.png').exists()


def test_deit_grows_faster():
    """The matrices of the attention count: FLOPs of both attentions are the same."""
    found = [
        scaling._peer_facts(FakeJob, name)['flops']
        for name in ('deit_t', 'deit_t_materialised')
    ]
    assert found[0] == found[1]
    # The published ones at 224, and more than four times as many at twice the side.
    assert found[0][0] == pytest.approx(1.26e9, rel=0.02)
    assert found[0][1] > 4.8 * found[0][0]


class FakeJob:
    sizes = ((224, 224), (448, 448))


def test_growth_and_holes():
    result = dict(
        inference=dict(images_per_second=[None, 10.0, 2.5, None, 0.3125]),
        sizes=[[1, 1], [10, 10], [20, 20], [20, 20], [40, 40]],
    )
    assert scaling._growth(result) == [None, 1.0, 1.0, None, 2.0]


def test_accuracy(tmp_path):
    for name, values in (('bright', (250, 200, 20)), ('dark', (0, 10, 30))):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        for i, value in enumerate(values):
            pixels = np.full((20, 20, 3), value, np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.png')

    class Model:
        net, task, label = Brightness(), 'classifier', 'it'
        prepare = staticmethod(
            lambda pixels: 150 - torch.tensor(pixels).float().permute(2, 0, 1)[None]
        )

    class Job:
        source = open_images(None, str(tmp_path / 'data'), 0, labelled=True)
        progress = staticmethod(lambda items, what: items)

    # One bright image is dark.
    assert scaling._accuracy(Job, Model, (16, 16)) == pytest.approx(5 / 6)
    Model.net = lambda images: torch.zeros(1, 1000)
    with pytest.raises(UsageError, match='2 class folders, and it knows 1000 classes'):
        scaling._accuracy(Job, Model, (16, 16))


def test_the_zoo_is_a_list_of_models():
    found = [subject.source for subject in parse_subjects(['zoo', 'vim_t'])]
    assert found.count('vim_t') == 2 and len(found) > 15
    assert all(published_accuracy(name) for name in found)
    assert published_accuracy('upernet_vmamba_t') is None
