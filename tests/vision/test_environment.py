"""The environment of this suite: its pins, torchvision's ops, our kernels."""

from importlib.metadata import distributions

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torchvision.ops import nms

from mmvssm.ops import backend_status
from tiny import REPO


def pins(name):
    """Pins of a constraints file and of those that it includes."""
    for line in (REPO / name).read_text().splitlines():
        if line.startswith('-c '):
            yield from pins(line.removeprefix('-c '))
        elif line and not line.startswith('#'):
            yield Requirement(line)


def test_pins():
    """Both files of constraints differ in torch and torchvision only."""
    mine, main = (
        {str(pin) for pin in pins(name)}
        for name in ('constraints-vision.txt', 'constraints.txt')
    )
    assert {Requirement(pin).name for pin in mine ^ main} == {'torch', 'torchvision'}


def test_installed():
    """What is pinned and installed has the pinned version."""
    found = {canonicalize_name(dist.name): dist.version for dist in distributions()}
    checked = {
        pin.name: (found[pin.name], pin.specifier)
        for pin in pins('constraints-vision.txt')
        if pin.name in found and (pin.marker is None or pin.marker.evaluate())
    }
    assert {'torch', 'torchvision', 'onedl-mmpretrain', 'timm'} <= checked.keys()
    wrong = {name: both for name, both in checked.items() if both[0] not in both[1]}
    assert not wrong


def test_torchvision_fits_torch():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [5, 5, 8, 8]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


def test_kernels_run():
    status = backend_status()
    assert status['cpu'] is None, status
