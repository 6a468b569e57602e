"""What is said of a config whose parts do not agree on what an image is."""

import pytest
from mmengine.config import Config

from mmvssm.engine import UsageError, load_config
from mmvssm.engine.configs import images
from mmvssm.engine.configs.images import check_channels, image_channels
from tiny import REPO

FOUR_BANDS = REPO / 'configs/upernet_vmamba_four_bands_quickstart.py'


def config(channels=None, mean=3, kind='mmvssm.SegDataPreProcessor', steps=()):
    backbone = dict(type='mmvssm.VSSM')
    if channels is not None:
        backbone['in_channels'] = channels
    numbers = None if mean is None else [0.0] * mean
    return Config(
        dict(
            model=dict(
                backbone=backbone,
                data_preprocessor=dict(type=kind, mean=numbers, std=numbers),
            ),
            train_dataloader=dict(dataset=dict(pipeline=list(steps))),
        )
    )


def refusal(cfg):
    with pytest.raises(UsageError) as error:
        check_channels(cfg, 'own.py')
    (line,) = str(error.value).splitlines()
    assert line.startswith('own.py: ')
    return line


@pytest.mark.parametrize(
    'channels, mean, found',
    [(None, 3, 3), (4, 4, 4), (4, 1, 4), (1, 1, 1), (7, None, 7), (None, None, 3)],
)
def test_channels_that_agree(channels, mean, found):
    cfg = config(channels, mean)
    check_channels(cfg, 'own.py')
    assert image_channels(cfg) == found


@pytest.mark.parametrize('channels, mean', [(None, 4), (4, 3), (1, 3), (3, 5)])
def test_channels_that_contradict_each_other(channels, mean):
    said = refusal(config(channels, mean))
    assert f'in_channels of the backbone is {channels or 3}' in said
    assert f'has {mean} numbers' in said


def test_backbones_of_others():
    """Their ``in_channels`` has the same meaning; they need not have one."""
    cfg = config(None, 4)
    cfg.model.backbone.type = 'ResNet'
    check_channels(cfg, 'own.py')
    assert image_channels(cfg) == 4
    cfg.model.backbone.in_channels = 3
    assert 'in_channels of the backbone is 3' in refusal(cfg)


@pytest.mark.parametrize('name', ['SegDataPreProcessor', 'DetDataPreprocessor'])
@pytest.mark.parametrize('scope', ['', 'mmseg.'])
def test_preprocessors_of_three_channels(name, scope):
    said = refusal(config(4, 4, scope + name))
    assert f"set type='mmvssm.{name}', which takes any number" in said
    check_channels(config(3, 3, scope + name), 'own.py')


@pytest.mark.parametrize('name', ['PhotoMetricDistortion', 'mmdet.YOLOXHSVRandomAug'])
def test_transforms_of_three_channels(name):
    step = dict(type='RandomApply', transforms=[dict(type=name)])
    check_channels(config(steps=[step]), 'own.py')
    for number in (1, 4):
        said = refusal(config(number, number, steps=[step]))
        assert f'{name.rpartition(".")[2]} takes images of 3 channels' in said


def test_without_tifffile(monkeypatch):
    load_config(str(FOUR_BANDS))
    monkeypatch.setattr(images, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match='run `pip install tifffile`'):
        load_config(str(FOUR_BANDS))
    load_config(str(REPO / 'configs/upernet_vmamba_quickstart.py'))


def test_tools_look_at_it():
    assert image_channels(load_config(str(FOUR_BANDS))) == 4
    with pytest.raises(UsageError, match='in_channels of the backbone is 5'):
        load_config(str(FOUR_BANDS), ['model.backbone.in_channels=5'])


def test_tools_take_the_pyramid_that_explains_itself(tmp_path):
    path = tmp_path / 'own.py'
    base = REPO / 'configs/upernet_vim_t.py'
    path.write_text(
        f"_base_ = {str(base)!r}\nmodel = dict(neck=dict(type='Feature2Pyramid'))\n"
    )
    assert load_config(str(path)).model.neck.type == 'mmvssm.Feature2Pyramid'
