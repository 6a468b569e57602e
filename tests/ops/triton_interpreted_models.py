"""Whole models in Triton's interpreter; see triton_interpreted.py.

They are of their true widths, on tiny images, with fewer of their equal blocks.
"""

import pytest
import torch

from mmvssm import ops
from mmvssm.backbones import VSSM, MambaR, Vim
from mmvssm.backbones.plain import ARCH_DEFAULTS
from mmvssm.ops.triton import tiles

from .scan_inputs import gradients, relative_error

SHALLOW = dict(ARCH_DEFAULTS, embed_dims=192, depth=4)
MODELS = {
    'VMamba-T': lambda: VSSM(dict(depths=(1, 1, 2, 1), dims=96)),
    'Vim-T': lambda: Vim(SHALLOW, 32),
    'MambaR-T': lambda: MambaR(dict(SHALLOW, registers=12), 32),
}


@pytest.fixture
def few_programs(monkeypatch):
    """One program for all channels, and chunks of few positions."""
    scan_tile, convolution_tile = tiles.scan_tile, tiles.convolution_tile

    def whole_scan(states, group_size, backward):
        channels = tiles.power_of_two(group_size)
        return scan_tile(states, group_size, backward)._replace(channels=channels)

    def whole_convolution(channels):
        return convolution_tile(channels)._replace(
            channels=tiles.power_of_two(channels)
        )

    monkeypatch.setattr(tiles, 'SCAN_CHUNK', 4)
    monkeypatch.setattr(tiles, 'scan_tile', whole_scan)
    monkeypatch.setattr(tiles, 'convolution_tile', whole_convolution)


@pytest.mark.parametrize('name', MODELS)
def test_models(few_programs, name):
    """Maps and gradients of all weights, with those of the backend torch."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    x = torch.randn(1, 3, 32, 32)
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = []
    for backend in ('triton', 'torch'):
        with ops.use_backend(backend):
            maps = net(x)
        # Not their squares, whose sum is constant behind a layer norm.
        found.append((maps, gradients(maps, weights)))
    (maps, got), (want_maps, want) = found
    for y, want_y in zip(maps, want_maps, strict=True):
        assert relative_error(y, want_y) < 1e-5
    for name, gradient in want.items():
        assert relative_error(got[name], gradient) < 1e-4, name
