"""Counters of FLOPs run models on memory that nobody has set.

Whatever is in an image, a model gives maps, or refuses NaN in one sentence.
"""

import pytest
import torch

from families import FAMILIES
from mmvssm import ops
from mmvssm.ops.checks import NaNInputError

LARGEST = torch.finfo(torch.float32).max


def garbage(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == 'bits':
        bits = torch.randint(-(2**31), 2**31, (2, 3, 33, 30), generator=generator)
        return bits.to(torch.int32).view(torch.float32)
    image = torch.randn(2, 3, 33, 30, generator=generator)
    if kind == 'some':
        for place, value in enumerate((torch.nan, torch.inf, -torch.inf, LARGEST)):
            image[place % 2, place % 3, 7 * place :: 11] = value
        return image
    value = dict(
        nan=torch.nan, inf=torch.inf, largest=LARGEST, smallest=2.0**-149, zero=0.0
    )
    return torch.full_like(image, value[kind]) * image.sign()


@pytest.mark.parametrize('backend', ['torch', 'cpu'])
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('train', [False, True], ids=['no_grad', 'grad'])
def test_whatever_the_memory_holds(family, backend, train):
    if ops.backend_status()[backend]:
        pytest.skip(ops.backend_status()[backend])
    torch.manual_seed(0)
    net = FAMILIES[family]().eval()
    for kind in ('bits', 'some', 'nan', 'inf', 'largest', 'smallest', 'zero'):
        with ops.use_backend(backend), torch.set_grad_enabled(train):
            try:
                maps = net(garbage(kind))
                if train:
                    sum(x.sum() for x in maps).backward()
            except NaNInputError as error:
                assert kind not in ('smallest', 'zero')
                assert '\n' not in str(error) and 'are NaN' in str(error)
                continue
        # Small values and none are ordinary ones.
        finite = all(bool(x.isfinite().all()) for x in maps)
        assert finite or kind not in ('smallest', 'zero')
