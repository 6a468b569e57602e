"""Where a process of a training sees a batch of one image."""

from collections.abc import Callable
from typing import NamedTuple

from mmengine.config import Config

# Epochs of these end; of the others nothing is known.
_ENDING = ('DefaultSampler', 'ClassAwareSampler')


class OneImage(NamedTuple):
    """A batch of one image.

    Attributes:
        text (str): Where it comes from, a sentence without its end.
        remedies (list[str]): What to set to have larger batches.
    """

    text: str
    remedies: list[str]


def find_one_image(
    cfg: Config, processes: int, count_images: Callable[[], int]
) -> OneImage | None:
    """Whether a batch of the training is one image in some process.

    Args:
        cfg: The config.
        processes: How many share a batch.
        count_images: Of the training's data set. Called where it matters.

    Returns:
        None where there is no such batch, or it cannot be known.
    """
    loader = cfg.train_dataloader
    size = loader.get('batch_size', 1)
    if size == 1:
        each = f'each of the {processes} processes' if processes > 1 else 'the model'
        return OneImage(
            f'train_dataloader.batch_size=1 gives {each} one image at a time',
            ['train_dataloader.batch_size to 2 or more'],
        )
    if _drops_last(loader) or not _ends(loader):
        return None
    images = count_images()
    # The sampler gives every process as many, unless it does not round up.
    shares = [-(-images // processes)]
    if not (loader.get('sampler') or {}).get('round_up', True):
        shares = [-(-(images - rank) // processes) for rank in range(processes)]
    alone = [share for share in shares if share % size == 1]
    if not alone or _ends_before(cfg, alone[0] // size):
        return None
    among = f' over {processes} processes' if processes > 1 else ''
    remedies = ['another train_dataloader.batch_size']
    if alone[0] > size:
        where = '.batch_sampler' if loader.get('batch_sampler') else ''
        remedies.insert(0, f'train_dataloader{where}.drop_last=True')
    return OneImage(
        f'{images} images{among} in batches of {size} leave one image for the last '
        'batch of an epoch',
        remedies,
    )


def _drops_last(loader: dict) -> bool:
    sampler = loader.get('batch_sampler') or {}
    return bool(loader.get('drop_last') or sampler.get('drop_last'))


def _ends(loader: dict) -> bool:
    """Whether an epoch has a last batch, whose size its images decide on."""
    kind = (loader.get('sampler') or {}).get('type')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    whole = loader.get('num_batch_per_epoch') is not None
    return name.rpartition('.')[2] in _ENDING and not whole


def _ends_before(cfg: Config, full: int) -> bool:
    """Whether a training ends within its first full batches."""
    steps = (cfg.get('train_cfg') or {}).get('max_iters')
    return steps is not None and steps <= full
