"""Every shim for a version of torch, mmengine, mmcv, mmseg or mmdet.

Importing ``mmvssm`` calls :func:`apply` once. No code outside this module may look at a
version number or patch another package. What is done at import only adds: names that
were not found are found, and files that were refused are read. If a function of
mmengine is wrapped for this, it passes on all names that are not of this package.
"""

import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.utils import is_installed

if TYPE_CHECKING:
    from mmengine.runner import IterBasedTrainLoop

_NUMPY_DTYPES = ('bool', 'float32', 'float64', 'int32', 'int64', 'uint8', 'uint32')
_OWN_SCOPE = 'mmvssm::'
_INFERENCERS = 'mmengine.infer.infer'
_MODEL_HUB = 'mmpretrain.apis.model'
_CONFIGS = Path(__file__).parent / '.mim' / 'configs'


def _register_config_scopes() -> None:
    """Let ``_base_ = 'mmvssm::...'`` and ``'mmseg::...'`` be found.

    mmengine looks a scope up in a fixed table of distributions. This package is not in
    it, and the maintained fork of mmsegmentation has another distribution name. The
    import name works for both the fork and the original.
    """
    MODULE2PACKAGE['mmvssm'] = 'mmvssm'
    if not is_installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _find_own_configs() -> None:
    """Let ``_base_ = 'mmvssm::upernet_vmamba_t.py'`` mean this package's file.

    mmengine's own look-up fails here for three reasons. It needs a sub-folder after the
    ``::``, and ``configs/`` has none. Up to 0.10.7 it looks beside the metadata of the
    distribution, where an editable install has no package. And it marks the inherited
    config with the scope before the ``::``; in this scope ``EncoderDecoder`` would have
    to be a class of this package.
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
                f'mmvssm has no config {cfg_path}; use one of {known}'
            )
        return str(path), None

    find_config.knows_mmvssm = True
    Config._get_cfg_path = staticmethod(find_config)


def find_own_models(weights_of: Callable[[str], str | None]) -> None:
    """Let ``DetInferencer('mask_rcnn_vmamba_t_1x')`` mean this package's config.

    mmengine looks a name up in the package of the default scope. For a config of this
    package that is mmseg or mmdet.

    Args:
        weights_of: Gives the published weights of a config by its name, or None.
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


class _Behind(MetaPathFinder):
    """Imports a module as soon as another one was imported."""

    def __init__(self, first: str, module: str):
        self.first, self.module = first, module

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != self.first or self not in sys.meta_path:
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


def import_behind(first: str, module: str) -> None:
    """Import a module when somebody imports another one, or now if somebody has.

    Args:
        first: Name of the other one, which takes long to import or is optional.
        module: Name of the module.
    """
    known = [x for x in sys.meta_path if isinstance(x, _Behind) and x.first == first]
    if first in sys.modules:
        import_module(module)
    elif not known:
        sys.meta_path.insert(0, _Behind(first, module))


def import_behind_inferencers(module: str) -> None:
    """Import a module behind mmengine's inferencers.

    These import much, OpenCV among it, which ``import mmvssm`` does without.

    Args:
        module: Its name.
    """
    import_behind(_INFERENCERS, module)


def import_behind_model_hub(module: str) -> None:
    """Import a module behind MMPretrain's table of models.

    Args:
        module: Its name.
    """
    import_behind(_MODEL_HUB, module)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's own checkpoints.

    They contain the message hub's ``HistoryBuffer`` (numpy arrays, and references to
    its own methods) and numpy scalars such as the best score, under the names of the
    numpy that wrote them. mmengine up to 0.10.7 does not declare them as safe. The fork
    declares them inside its loader. Afterwards it removes the declaration, even if
    somebody else had made it.
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
    """The function under the name that a pickle uses for it."""

    def alias(*arguments):
        return function(*arguments)

    alias.__module__ = module
    alias.__name__ = alias.__qualname__ = name or function.__name__
    return alias


def why_no_detection() -> str | None:
    """Why detectors cannot be built here, or None where they can.

    mmdet needs mmcv's compiled ops. mmcv-lite does not have them, and a wheel built for
    another torch cannot load them. Older releases of mmdet assert the version of mmcv.
    """
    return _why_not('mmcv._ext', 'no mmcv with compiled ops') or _why_not(
        'mmdet.models', 'no mmdet that can be imported'
    )


def why_no_classification() -> str | None:
    """Why classifiers of MMPretrain cannot be built here, or None where they can.

    mmpretrain imports torchvision. One built for another torch registers its operators
    with an error that is no ImportError.
    """
    return _why_not('torchvision', 'no torchvision that can be imported') or _why_not(
        'mmpretrain.models', 'no mmpretrain that can be imported'
    )


def why_no_timm() -> str | None:
    """Why timm cannot be used here, or None where it can. It imports torchvision."""
    return _why_not('timm', 'no timm that can be imported')


def _why_not(module: str, what: str) -> str | None:
    try:
        import_module(module)
    except (ImportError, AssertionError, RuntimeError) as error:
        return f'{what} ({str(error).splitlines()[0]})'
    return None


def renew_sampler(loop: 'IterBasedTrainLoop') -> bool:
    """Let an endless sampler begin with its first image again.

    The loops of mmengine up to 0.10.7 make their iterator, and so the workers, before a
    hook can change the loader. The workers have then taken images of the sampler.

    Args:
        loop: A loop that has run no iteration in this process.

    Returns:
        Whether the sampler gives its first image next.
    """
    from mmengine.dataset import InfiniteSampler

    if _makes_iterator_late(loop):
        return True
    loader, sampler = loop.dataloader, loop.dataloader.sampler
    if not isinstance(sampler, InfiniteSampler) or loader.batch_size is None:
        return False
    again = InfiniteSampler(sampler.dataset, sampler.shuffle, sampler.seed)
    sampler.indices = again.indices
    return True


def _makes_iterator_late(loop: 'IterBasedTrainLoop') -> bool:
    return hasattr(type(loop.dataloader_iterator), 'skip_iter')


def take_batches_from(loop: 'IterBasedTrainLoop', batches: Iterator) -> None:
    """Let a training loop take its batches from another iterator than its own.

    The loops of mmengine up to 0.10.7 ask for the batches that were seen, one by one,
    where newer ones call ``skip_iter``.

    Args:
        loop: A loop that has run no iteration in this process.
        batches: Begins behind the batches that were seen. Its ``skip_iter`` does
            nothing.
    """
    # Private attribute of torch. Persistent workers would be kept otherwise.
    loop.dataloader._iterator = None
    if not _makes_iterator_late(loop):
        batches = chain(repeat(None, loop.iter), batches)
    loop.dataloader_iterator = batches


def drop_messages(unwanted: re.Pattern) -> None:
    """Keep mmengine from logging or printing some messages in this process.

    Its ``print_log`` prints what it is given no logger for, whatever the level is.

    Args:
        unwanted: Matches the start of these messages. A later call replaces it.
    """
    from mmengine import logging as mm_logging

    def is_wanted(record: logging.LogRecord) -> bool:
        return not unwanted.match(record.getMessage())

    # An override: MMLogger has the method of logging.Logger.
    MMLogger.filter = lambda self, record: (
        is_wanted(record) and logging.Logger.filter(self, record)
    )
    say = getattr(mm_logging.print_log, 'before', mm_logging.print_log)

    def print_log(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
        if logger is not None or not unwanted.match(str(msg)):
            say(msg, logger, level)

    print_log.before = say
    # Who imported it earlier keeps mmengine's.
    mm_logging.print_log = print_log


def apply() -> None:
    """Apply every shim. Calling it again changes nothing."""
    _register_config_scopes()
    _find_own_configs()
    allow_mmengine_checkpoints()
