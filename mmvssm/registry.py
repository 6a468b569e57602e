"""Child registries of mmengine's registries, in the scope ``mmvssm``.

``type='mmvssm.VSSM'`` in any config is enough to find a module of this package. For
this prefix mmengine imports ``mmvssm.registry``, and then the ``locations`` below. So a
config needs neither ``custom_imports`` nor a certain working directory.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

DATA_SAMPLERS = Registry(
    'data sampler',
    parent=MMENGINE_DATA_SAMPLERS,
    scope='mmvssm',
    locations=['mmvssm.classification'],
)
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='mmvssm', locations=['mmvssm.engine']
)
LOOPS = Registry(
    'loop', parent=MMENGINE_LOOPS, scope='mmvssm', locations=['mmvssm.engine']
)
METRICS = Registry(
    'metric', parent=MMENGINE_METRICS, scope='mmvssm', locations=['mmvssm.engine']
)
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmvssm',
    locations=[
        *('mmvssm.backbones', 'mmvssm.heads', 'mmvssm.layers', 'mmvssm.necks'),
        *('mmvssm.classification', 'mmvssm.data_preprocessor'),
    ],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmvssm',
    locations=['mmvssm.engine'],
)
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmvssm',
    locations=['mmvssm.engine'],
)
PARAM_SCHEDULERS = Registry(
    'parameter scheduler',
    parent=MMENGINE_PARAM_SCHEDULERS,
    scope='mmvssm',
    locations=['mmvssm.engine'],
)
STRATEGIES = Registry(
    'strategy',
    parent=MMENGINE_STRATEGIES,
    scope='mmvssm',
    locations=['mmvssm.engine'],
)
TRANSFORMS = Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='mmvssm',
    locations=['mmvssm.classification'],
)
