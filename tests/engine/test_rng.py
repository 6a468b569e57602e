"""Random numbers that go on."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmvssm.engine.rng import BatchSeeds, get_rng_state, isolate_loader, set_rng_state


class Draws(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))])


def test_states_survive_a_file(tmp_path):
    torch.save(get_rng_state(), tmp_path / 'state.pt')
    drawn = Draws()[0]
    assert not torch.equal(Draws()[0], drawn)
    set_rng_state(torch.load(tmp_path / 'state.pt', weights_only=True))
    assert torch.equal(Draws()[0], drawn)


def batches(first, rank=0):
    loader = DataLoader(Draws(), 2, num_workers=2, collate_fn=torch.stack)
    isolate_loader(loader, 5)
    BatchSeeds(loader, seed=5, rank=rank, first=first)
    return list(loader)


def test_batches_depend_on_their_number_alone():
    state = torch.get_rng_state()
    start = batches(0)
    assert torch.equal(torch.get_rng_state(), state)
    resumed = batches(3)
    for a, b in zip(start[3:], resumed):
        assert torch.equal(a, b)
    for a, b in zip(start, batches(0, rank=1)):
        assert not torch.equal(a, b)
    assert len({float(batch[0, i]) for batch in start for i in range(3)}) == 18
