"""Which batches a training begins with; tests/engine/hooks has whole trainings."""

import logging
import time
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from mmvssm.engine import SafeCheckpointHook, UsageError
from mmvssm.engine.hooks import checkpoint
from mmvssm.engine.training.epoch_loop import (
    BatchesBehind,
    has_epochs,
    is_endless,
    resume_within_epochs,
)
from toy import ToyBatches


class Numbers(torch.utils.data.Dataset):
    """Says what it is asked for."""

    def __init__(self, length=11):
        self.length, self.loaded = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.loaded += 1
        return index


class Grouped(ToyBatches):
    def __iter__(self):
        return (batch for batch in super().__iter__() if batch)


SAMPLERS = {
    'shuffled': partial(DefaultSampler, seed=3),
    'in order': partial(DefaultSampler, shuffle=False),
    "torch's": partial(DistributedSampler, num_replicas=2, rank=1, seed=3),
    'sequential': SequentialSampler,
    'endless': partial(InfiniteSampler, seed=3),
}
BATCHES = {
    'plain': dict(batch_size=3),
    'dropped': dict(batch_size=3, drop_last=True),
    'grouped': Grouped,
}


def make_loader(sampler, batches=None, length=11, **more):
    dataset = Numbers(length)
    sampler = SAMPLERS[sampler](dataset)
    options = BATCHES[batches or 'plain']
    if isinstance(options, dict):
        return DataLoader(dataset, sampler=sampler, **options, **more)
    batch_sampler = options(sampler, 2, drop_last=False)
    return DataLoader(dataset, batch_sampler=batch_sampler, **more)


def note(places, *place):
    places.append(place)


def numbers(batches, first, last):
    return [batch.tolist() for batch in islice(batches, first, last)]


@pytest.fixture
def hurried(monkeypatch):
    """mmengine's iterator waits for two seconds between epochs."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)


@pytest.mark.parametrize('batches', BATCHES)
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_goes_on_where_an_undisturbed_iterator_would(sampler, batches, hurried):
    whole = numbers(_InfiniteDataloaderIterator(make_loader(sampler, batches)), 0, 30)
    for seen in (0, 1, 3, 6, 7, 17, 25):
        loader = make_loader(sampler, batches)
        begun = []
        behind = BatchesBehind(loader, seen, partial(note, begun))
        behind.skip_iter(seen)
        assert numbers(behind, 0, 5) == whole[seen : seen + 5]
        length = len(loader)
        assert begun[0] == (
            (seen, 0) if sampler == 'endless' else divmod(seen, length)[::-1]
        )
        # Those before were not loaded.
        assert loader.dataset.loaded == sum(map(len, whole[seen : seen + 5]))


@pytest.mark.parametrize('persistent', [False, True])
def test_with_workers(persistent, hurried):
    more = dict(num_workers=2, persistent_workers=persistent)
    whole = numbers(_InfiniteDataloaderIterator(make_loader('shuffled')), 0, 15)
    behind = BatchesBehind(make_loader('shuffled', **more), 6, lambda *place: None)
    assert numbers(behind, 0, 7) == whole[6:13]


def test_hooks_may_set_the_epoch_before_the_first_batch():
    loader = make_loader('shuffled')
    behind = BatchesBehind(loader, 9, lambda *place: None)
    loader.sampler.set_epoch(0)  # As mmengine's DistSamplerSeedHook does.
    next(behind)
    assert loader.sampler.epoch == 2


def test_loader_without_batches_is_refused():
    loader = make_loader('shuffled', 'dropped', length=2)
    with pytest.raises(UsageError, match='fewer images than batch_size'):
        BatchesBehind(loader, 0, lambda *place: None)


def test_what_samplers_can():
    can = {
        name: (has_epochs(make_loader(name)), is_endless(make_loader(name)))
        for name in SAMPLERS
    }
    assert can.pop('endless') == (False, True)
    assert set(can.values()) == {(True, False)}
    others = DataLoader(Numbers(), sampler=RandomSampler(Numbers()))
    assert not has_epochs(others) and not is_endless(others)


def test_sampler_that_cannot_is_named_with_the_remedy(caplog):
    loader = DataLoader(Numbers(), sampler=RandomSampler(Numbers()))
    loop = SimpleNamespace(dataloader=loader, iter=0)
    runner = SimpleNamespace(
        train_loop=loop, train_dataloader=loader, logger=logging.getLogger(), iter=0
    )
    checkpoint._start_behind_seen(runner)
    assert 'RandomSampler cannot begin behind the images seen' in caplog.text
    assert 'train_dataloader.sampler.type=InfiniteSampler' in caplog.text
    # It is left to mmengine.
    assert vars(loop) == dict(dataloader=loader, iter=0)


def test_other_tools_are_told_of_the_loop_that_repeats_epochs(caplog):
    runner = SimpleNamespace(
        train_loop=object.__new__(EpochBasedTrainLoop),
        train_dataloader=make_loader('shuffled'),
        **dict(val_loop=None, optim_wrapper=None, logger=logging.getLogger()),
        **dict(cfg={}, seed=0, rank=0),
    )
    SafeCheckpointHook()._prepare_loaders(runner)
    assert 'EpochBasedTrainLoop repeats an epoch from its start' in caplog.text
    assert "train_cfg.type='mmvssm.ResumableEpochLoop'" in caplog.text


class EarlyIterator:
    """As mmengine up to 0.10.7 has it: it takes images before a hook is asked."""

    def __init__(self, loader):
        self.taken = iter(loader)
        next(self.taken)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('sampler', ['shuffled', 'endless'])
def test_loop_that_makes_its_iterator_early(sampler, workers, hurried):
    whole = numbers(_InfiniteDataloaderIterator(make_loader(sampler)), 0, 15)
    loader = make_loader(sampler, num_workers=workers, persistent_workers=workers > 0)
    loop = SimpleNamespace(dataloader=loader, iter=7)
    loop.dataloader_iterator = EarlyIterator(loader)
    checkpoint._start_behind_seen(
        SimpleNamespace(
            train_loop=loop, train_dataloader=loader, iter=7, seed=3, rank=0
        )
    )
    # It asks for every batch that was seen, and drops it.
    assert [next(loop.dataloader_iterator) for _ in range(7)] == [None] * 7
    assert numbers(loop.dataloader_iterator, 0, 5) == whole[7:12]


@pytest.mark.parametrize(
    ('loop', 'changed'),
    [
        (dict(type='EpochBasedTrainLoop', max_epochs=2), True),
        (dict(type=EpochBasedTrainLoop, max_epochs=2), True),
        (dict(by_epoch=True, max_epochs=2), True),
        (dict(by_epoch=False, max_iters=2), False),
        (dict(type='IterBasedTrainLoop', max_iters=2), False),
        (dict(type='MyEpochBasedTrainLoop', max_epochs=2), False),
    ],
)
def test_loop_that_cannot_resume_within_epochs_is_replaced(loop, changed):
    cfg = Config(dict(train_cfg=dict(loop)))
    assert resume_within_epochs(cfg) is changed
    expected = dict(type='mmvssm.ResumableEpochLoop', max_epochs=2) if changed else loop
    assert cfg.train_cfg == expected
    assert not resume_within_epochs(Config(dict(model=dict())))
