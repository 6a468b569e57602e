import numpy as np
import pytest
import torch

import mmvssm
from mmvssm.analysis.studies.subjects import parse_subjects
from mmvssm.engine import UsageError
from studies import write_detector, write_segmentor
from tiny import REPO
from tiny_det import needs_detection

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return write_segmentor(tmp_path_factory.mktemp('configs'), 'mlla')


def test_labels_are_different(tmp_path, config):
    files = [tmp_path / name for name in ('a.pth', 'b.pth')]
    for file in files:
        file.touch()
    entries = ['vim_t', f'{config}={files[0]}', f'{config}={files[1]}', 'vim_t']
    found = parse_subjects(entries)
    assert [x.label for x in found] == ['vim_t', 'mlla a', 'mlla b', 'vim_t (2)']
    assert [x.title for x in found][0::3] == [
        'vim_t (untrained)',
        'vim_t (2) (untrained)',
    ]
    assert found[1].title == 'mlla a'


def test_a_name_of_the_zoo_is_a_checkpoint():
    (subject,) = parse_subjects(['vim_t=vim_t'])
    assert subject.checkpoint == 'mmvssm://vim_t'


@pytest.mark.parametrize(
    'entry, said',
    [
        ('vim_x', 'vim_x is neither a config'),
        ('none.py', 'no config file at'),
        ('vim_t=none.pth', 'no checkpoint at'),
        ('{config}=none.pth', 'no checkpoint at'),
    ],
)
def test_no_such_thing(entry, said, config):
    with pytest.raises(UsageError, match=said):
        parse_subjects([entry.format(config=config)])


def test_other_channels():
    path = REPO / 'configs/upernet_vmamba_four_bands_quickstart.py'
    with pytest.raises(UsageError, match='takes images of 4 channels'):
        parse_subjects([str(path)])


def test_weights(tmp_path, config):
    """Random ones come from the seed; those of a file are loaded, or left out."""
    (subject,) = parse_subjects([str(config)])
    first, other = (subject.build(seed=seed).net for seed in (0, 1))
    torch.save(dict(state_dict=other.state_dict()), tmp_path / 'x.pth')
    (subject,) = parse_subjects([f'{config}={tmp_path / "x.pth"}'])
    trained, untrained = subject.build(), subject.build(trained=False)

    def equal(a, b):
        a, b = a.state_dict(), b.state_dict()
        # No prediction uses the auxiliary head.
        used = [key for key in a if not key.startswith('auxiliary_head.')]
        return all(torch.equal(a[key], b[key]) for key in used)

    assert equal(trained.net, other)
    assert equal(untrained.net, first)
    assert not equal(first, other)
    assert not trained.net.training
    assert (trained.task, trained.family.name) == ('segmentor', 'mlla')


def test_head_of_a_classifier(tmp_path, monkeypatch):
    """A file without a head is good enough, and known to be one."""
    net = mmvssm.build_classifier('vim_t', num_classes=1000)
    torch.save(net.backbone.state_dict(), tmp_path / 'backbone.pth')
    torch.save(net.state_dict(), tmp_path / 'whole.pth')
    for name, loaded in (('backbone', False), ('whole', True)):
        (subject,) = parse_subjects([f'vim_t={tmp_path}/{name}.pth'])
        model = subject.build()
        assert model.loaded_head is loaded
        assert model.task == 'classifier'
        weight = model.backbone.patch_embed.proj.weight
        assert torch.equal(weight, net.backbone.patch_embed.proj.weight)
        if loaded:
            model.require_head()
            continue
        with pytest.raises(UsageError, match='backbone.pth has no head for vim_t'):
            model.require_head()


@pytest.mark.parametrize('bgr_to_rgb', [True, False])
@pytest.mark.parametrize(
    'write', ['segmentor', pytest.param('detector', marks=needs_detection)]
)
def test_images_are_prepared_as_by_the_toolbox(write, bgr_to_rgb, tmp_path, config):
    if write == 'detector':
        config = write_detector(tmp_path)
    options = [
        f'model.data_preprocessor.bgr_to_rgb={bgr_to_rgb}',
        'model.data_preprocessor.mean=[1.0, 20.0, 30.0]',
        'model.data_preprocessor.std=[2.0, 3.0, 50.0]',
        'model.data_preprocessor.pad_size_divisor=1',
    ]
    if write == 'segmentor':
        options = options[:3]
    (subject,) = parse_subjects([str(config)], options)
    model = subject.build()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    loaded = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)
    given = dict(inputs=[loaded], data_samples=None)
    expected = model.net.data_preprocessor(given, False)['inputs']
    torch.testing.assert_close(model.prepare(pixels), expected)


def test_too_small_an_image():
    (subject,) = parse_subjects(['vim_t'])
    with pytest.raises(UsageError, match='at least 16x16 pixels, and --size is 8 64'):
        subject.build().prepare(np.zeros((8, 64, 3), np.uint8))
