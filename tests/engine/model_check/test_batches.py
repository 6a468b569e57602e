"""Which trainings have a batch of one image, against the loaders themselves."""

from itertools import product

import pytest
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from mmvssm.engine.model_check.batches import find_one_image
from tiny_det import needs_detection


@DATASETS.register_module()
class Numbers(BaseDataset):
    """So many entries, all of one shape."""

    def __init__(self, number):
        self.number = number
        super().__init__(serialize_data=False)

    def load_data_list(self):
        return [dict(width=2, height=1) for _ in range(self.number)]

    def prepare_data(self, idx):
        return idx


def config(images, train=None, **loader):
    loader = dict(sampler=dict(type='DefaultSampler'), num_workers=0) | loader
    loader['dataset'] = dict(type='Numbers', number=images)
    return Config(dict(train_dataloader=loader, train_cfg=train or dict(max_epochs=2)))


def batch_sizes(cfg, processes, monkeypatch):
    """Of an epoch, in all processes."""
    found = set()
    for rank in range(processes):
        monkeypatch.setattr(
            'mmengine.dataset.sampler.get_dist_info',
            lambda rank=rank: (rank, processes),
        )
        monkeypatch.setattr('mmengine.runner.runner.get_world_size', lambda: processes)
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        found |= {len(batch) for batch in loader}
    return found


@pytest.mark.parametrize(
    'loader',
    [
        dict(batch_size=1),
        dict(batch_size=2),
        dict(batch_size=3),
        dict(batch_size=2, drop_last=True),
        dict(batch_size=2, num_batch_per_epoch=2),
        dict(batch_size=2, sampler=dict(type='DefaultSampler', round_up=False)),
    ],
    ids=str,
)
def test_it_says_what_the_loader_does(loader, monkeypatch):
    for images, processes in product(range(1, 8), range(1, 4)):
        cfg = config(images, **loader)
        found = find_one_image(cfg, processes, lambda images=images: images)
        sizes = batch_sizes(cfg, processes, monkeypatch)
        assert (found is not None) == (1 in sizes), (images, processes)
        # Where it is advised, dropping the last batch helps and leaves some.
        if found and 'train_dataloader.drop_last=True' in found.remedies:
            cfg.train_dataloader.drop_last = True
            sizes = batch_sizes(cfg, processes, monkeypatch)
            assert sizes and 1 not in sizes, (images, processes)


@needs_detection
@pytest.mark.parametrize('drop_last', [False, True])
def test_batches_by_shape(drop_last, monkeypatch):
    batches = dict(type='mmdet.AspectRatioBatchSampler', drop_last=drop_last)
    cfg = config(5, batch_size=2, batch_sampler=batches)
    found = find_one_image(cfg, 1, lambda: 5)
    assert (found is not None) == (1 in batch_sizes(cfg, 1, monkeypatch))
    assert (
        drop_last or 'train_dataloader.batch_sampler.drop_last=True' in found.remedies
    )


def test_what_does_not_end_has_no_last_batch():
    cfg = config(5, batch_size=2)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler')
    never = pytest.fail
    assert find_one_image(cfg, 1, lambda: never('it needs no count')) is None
    cfg.train_dataloader.sampler = dict(type='MySampler')
    assert find_one_image(cfg, 1, lambda: never('nothing is known of it')) is None


def test_a_training_may_end_before():
    cfg = config(5, dict(type='IterBasedTrainLoop', max_iters=2), batch_size=2)
    assert find_one_image(cfg, 1, lambda: 5) is None
    cfg.train_cfg.max_iters = 3
    assert 'leave one image' in find_one_image(cfg, 1, lambda: 5).text
