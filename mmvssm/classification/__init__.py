"""Parts for MMPretrain's ``ImageClassifier``, such as ``mmvssm.PooledClsHead``.

mmpretrain is optional, and takes seconds to import. So a config finds a part here by a
small function, which imports the module of the part when it is built. Where mmpretrain
is missing it raises one sentence that says what to install.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from mmengine.registry import Registry

from mmvssm.compat import why_no_classification
from mmvssm.errors import MissingPackageError
from mmvssm.registry import DATA_SAMPLERS, MODELS, TRANSFORMS

# What a config may name: registry, module of this folder, classes in it.
PARTS: tuple[tuple[Registry, str, tuple[str, ...]], ...] = (
    (MODELS, 'heads', ('PooledClsHead', 'ClassTokenClsHead', 'RegisterClsHead')),
    (MODELS, 'mesa', ('MESAClassifier',)),
    (MODELS, 'data_preprocessor', ('ClsDataPreprocessor',)),
    (TRANSFORMS, 'transforms', ('ThreeAugment',)),
    (DATA_SAMPLERS, 'samplers', ('DeiTRepeatAugSampler',)),
)
_MODULES = {name: module for _, module, names in PARTS for name in names}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a part: ``from mmvssm.classification import RegisterClsHead``."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return _import(name)


def _import(name: str) -> Any:
    if reason := why_no_classification():
        raise MissingPackageError(
            f'mmvssm.{name} is a part of a classifier of MMPretrain, and there is '
            f'{reason}: run `make install-vision`, or install onedl-mmpretrain and a '
            'torchvision that fits your torch'
        )
    return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)


def _builder(name: str) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        return _import(name)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    # For who wants to know which arguments it takes.
    build.load_class = partial(_import, name)
    return build


for _registry, _, _names in PARTS:
    for _name in _names:
        _registry.register_module(name=_name, module=_builder(_name), force=True)
