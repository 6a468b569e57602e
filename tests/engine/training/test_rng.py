"""Random numbers that go on."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmvssm.engine.training.epoch_loop import pass_over
from mmvssm.engine.training.rng import (
    BatchSeeds,
    get_rng_state,
    isolate_loader,
    set_rng_state,
)


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


def make_loader(rank=0, length=None, persistent=False):
    loader = DataLoader(
        Draws(),
        2,
        num_workers=2,
        collate_fn=torch.stack,
        persistent_workers=persistent,
    )
    isolate_loader(loader, 5)
    return loader, BatchSeeds(loader, seed=5, rank=rank, length=length)


def batches(first, rank=0):
    loader, seeds = make_loader(rank)
    seeds.begin(first)
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


def epochs(persistent, first=0):
    """Batches of three epochs, without the first ones of the first."""
    loader, seeds = make_loader(length=6, persistent=persistent)
    if first:
        pass_over(loader, first)
    drawn = []
    for epoch in range(3):
        seeds.begin(0 if epoch else first, epoch)
        drawn += loader
    return drawn


@pytest.mark.parametrize('persistent', [False, True])
def test_epochs_go_on_where_they_were_stopped(persistent):
    whole = epochs(persistent=False)
    assert len({float(batch[0, 0]) for batch in whole}) == 18
    for first in (0, 1, 4, 5, 6):
        for a, b in zip(whole[first:], epochs(persistent, first), strict=True):
            assert torch.equal(a, b)
