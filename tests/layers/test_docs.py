"""The examples of docs/layers.md run, and its network learns."""

import re

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

import mmvssm
from tiny import REPO

EXAMPLES = re.findall(
    r'```python\n(.*?)```', (REPO / 'docs' / 'layers.md').read_text(), re.S
)


def run(example):
    found = {}
    exec(example, found)
    return found


def test_sequence_blocks():
    found = run(EXAMPLES[0])
    assert found['y'].shape == (2, 196, 64) and found['y'].isfinite().all()


def test_u_shaped_network_trains():
    torch.manual_seed(0)
    found = run(EXAMPLES[1])
    assert found['logits'].shape == (1, 2, 64, 96)
    net = found['UNet'](classes=2, dims=(8, 16, 32))
    # Which half of the image is bright is for the network to say, at every pixel.
    x = torch.randn(4, 3, 32, 32) * 0.1
    target = torch.zeros(4, 32, 32, dtype=torch.long)
    for i, part in enumerate((slice(16), slice(16, 32)) * 2):
        x[i, :, part] += 1
        target[i, part] = 1
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in net.parameters())
    assert losses[-1] < 0.1 * losses[0]


def test_registered():
    assert isinstance(run(EXAMPLES[2])['block'], mmvssm.layers.VSSBlock)
    cfg = dict(channels=8)
    for name in ('SS2D', 'CascadeSS2D', 'VSSBlock', 'MambaBlock', 'BidirectionalMamba'):
        assert MODELS.build(dict(cfg, type=f'mmvssm.{name}'))
    assert MODELS.build(dict(cfg, type='mmvssm.MLLABlock', heads=2))
