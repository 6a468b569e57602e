"""Every shim for a version of torch, mmengine, mmcv, mmseg or mmdet.

Importing ``mmvssm`` calls :func:`apply` once. Nothing outside this module may
look at a version number or patch somebody else's module. What is done at import only
adds: names that led nowhere are found, files that were refused are read. A function of
mmengine that is wrapped for this passes on whatever is not a name of this package.
"""

import pickle
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.utils import is_installed

if TYPE_CHECKING:
    from mmengine.runner import IterBasedTrainLoop

_NUMPY_DTYPES = ('bool', 'float32', 'float64', 'int32', 'int64', 'uint8', 'uint32')
_OWN_SCOPE = 'mmvssm::'
_INFERENCERS = 'mmengine.infer.infer'
_CONFIGS = Path(__file__).parent / '.mim' / 'configs'


def _register_config_scopes() -> None:
    """Let ``_base_ = 'mmvssm::...'`` and ``'mmseg::...'`` be found.

    mmengine looks a scope up in a fixed table of distributions. This package
    is not in it, and the maintained fork of mmsegmentation has a distribution
    name of its own; the import name works for both the fork and the original.
    """
    MODULE2PACKAGE['mmvssm'] = 'mmvssm'
    if not is_installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _find_own_configs() -> None:
    """Let ``_base_ = 'mmvssm::upernet_vmamba_t.py'`` mean this package's file.

    mmengine's own look-up fails here in three ways: it insists on a
    sub-folder after the ``::``, and ``configs/`` is flat; up to 0.10.7 it
    looks beside the distribution's metadata, where an editable install has no
    package; and it marks what it inherits with the scope before the ``::``,
    in which ``EncoderDecoder`` would have to be a class of this package.
    """
    find = Config._get_cfg_path
    if getattr(find, 'knows_mmvssm', False):
        return

    def find_config(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if not cfg_path.startswith(_OWN_SCOPE):
            return find(cfg_path, filename)
        path = _CONFIGS / cfg_path.removeprefix(_OWN_SCOPE)
        if not path.is_file():
            known = sorted(p.name for p in _CONFIGS.glob('*.py'))
            raise FileNotFoundError(
                f'mmvssm has no config {cfg_path}; take one of {known}'
            )
        return str(path), None

    find_config.knows_mmvssm = True
    Config._get_cfg_path = staticmethod(find_config)


def find_own_models(weights_of: Callable[[str], str | None]) -> None:
    """Let ``DetInferencer('mask_rcnn_vmamba_t_1x')`` mean this package's config.

    mmengine looks a name up in the package whose scope the model is built in,
    which for a config of this package is that of mmseg or mmdet.

    Args:
        weights_of: The published weights of a config, by its name; None if there are
            none.
    """
    # The package itself may be on its way to be imported.
    from mmengine.infer.infer import BaseInferencer

    find = BaseInferencer._load_model_from_metafile
    if getattr(find, 'knows_mmvssm', False):
        return

    def find_model(self: 'BaseInferencer', model: str) -> tuple[Config, str | None]:
        path = _CONFIGS / f'{model}.py'
        # A path is no name.
        own = Path(model).name == model and path.is_file()
        if not own:
            return find(self, model)
        return Config.fromfile(path), weights_of(model)

    find_model.knows_mmvssm = True
    BaseInferencer._load_model_from_metafile = find_model


class _BehindInferencers(MetaPathFinder):
    """Imports a module as soon as mmengine's inferencers were imported."""

    def __init__(self, module: str):
        self.module = module

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != _INFERENCERS or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(self.module)

            spec.loader.exec_module = execute_both
        return spec


def import_behind_inferencers(module: str) -> None:
    """Import a module when somebody imports mmengine's inferencers, or now if so.

    These import much, OpenCV among it, which ``import mmvssm`` does without.

    Args:
        module: Its name.
    """
    if _INFERENCERS in sys.modules:
        import_module(module)
    elif not any(isinstance(finder, _BehindInferencers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BehindInferencers(module))


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's own checkpoints.

    They hold the message hub's ``HistoryBuffer`` (numpy arrays, and references
    to its own methods) and numpy scalars such as the best score, under the
    names of the numpy they were written with. mmengine up to 0.10.7 declares
    none of them as safe; the fork does so inside its own loader, and takes it
    back there, for those who had declared it, too.
    """
    multiarray = getattr(np, '_core', None) or np.core
    multiarray = multiarray.multiarray
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *{type(np.dtype(name)) for name in _NUMPY_DTYPES},
            *(
                _named(f'{package}.multiarray', function)
                for package in ('numpy.core', 'numpy._core')
                for function in (multiarray._reconstruct, multiarray.scalar)
            ),
            _named('builtins', _history_buffer_method, 'getattr'),
        ]
    )


def _history_buffer_method(owner: type, name: str) -> Callable:
    """``getattr`` for a pickled reference to a method of HistoryBuffer."""
    if owner is not HistoryBuffer:
        raise pickle.UnpicklingError(f'{owner} may not be read from a checkpoint')
    return getattr(owner, name)


@cache
def _named(module: str, function: Callable, name: str = '') -> Callable:
    """The function under the name by which a pickle refers to it."""

    def alias(*arguments):
        return function(*arguments)

    alias.__module__ = module
    alias.__name__ = alias.__qualname__ = name or function.__name__
    return alias


def why_no_detection() -> str | None:
    """Why detectors cannot be built here, or None where they can.

    mmdet needs mmcv's compiled ops, which mmcv-lite does not have and which a
    wheel built for another torch fails to load. Its older releases assert the
    version of mmcv.
    """
    for module, what in (
        ('mmcv._ext', 'no mmcv with compiled ops'),
        ('mmdet.models', 'no mmdet that can be imported'),
    ):
        try:
            import_module(module)
        except (ImportError, AssertionError) as error:
            return f'{what} ({str(error).splitlines()[0]})'
    return None


def start_behind_seen(loop: 'IterBasedTrainLoop') -> bool:
    """Let a training loop go on behind the images it has seen, not loading them.

    The loops of mmengine up to 0.10.7 make their iterator, and with it the
    workers, before a hook can change the loader, and load what they skip.

    Args:
        loop: Of which no iteration was run in this process.

    Returns:
        Whether it will. If not, it loads the batches again and drops them.
    """
    from mmengine.dataset import InfiniteSampler

    loader, sampler = loop.dataloader, loop.dataloader.sampler
    iterator = type(loop.dataloader_iterator)
    if hasattr(iterator, 'skip_iter'):
        return hasattr(sampler, 'skip')
    moves = isinstance(sampler, InfiniteSampler) and loader.batch_size is not None
    seen = loop.iter if moves else 0
    if moves:
        # Workers have taken indices already: the stream is made anew.
        again = InfiniteSampler(sampler.dataset, sampler.shuffle, sampler.seed)
        sampler.indices = islice(again.indices, seen * loader.batch_size, None)

    # Private to torch: persistent workers, which would be kept as they are.
    loader._iterator = None

    def batches() -> Iterator:
        for _ in range(seen):
            yield None
        yield from iterator(loader)

    loop.dataloader_iterator = batches()
    return moves


def apply() -> None:
    """Apply every shim. Calling it again changes nothing."""
    _register_config_scopes()
    _find_own_configs()
    allow_mmengine_checkpoints()
