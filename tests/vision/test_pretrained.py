"""A folder that holds a whole classifier of MMPretrain."""

import torch
from mmengine.config import Config

import mmvssm
from tiny_cls import CLASSES, build, model_config


def test_a_classifier_comes_back(tmp_path):
    net = build().eval()
    net.dataset_meta = dict(classes=CLASSES)
    config = Config(dict(model=model_config(), default_scope='mmpretrain'))
    mmvssm.save_pretrained(net, tmp_path / 'folder', config=config)
    again = mmvssm.load_pretrained(tmp_path / 'folder')
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), net(images), rtol=0, atol=0)
    assert tuple(again.dataset_meta['classes']) == CLASSES
    # Plain PyTorch takes the weights alone.
    own = build('vmamba')
    assert not mmvssm.load_checkpoint(own, tmp_path / 'folder', strict=True).missing
