"""MMPretrain's functions that take a model's name know the models of this package.

``mmpretrain.get_model('vmamba_t_s1l8', pretrained=True)``, ``list_models``,
``inference_model`` and ``ImageClassificationInferencer``. This module is imported as
soon as somebody imports MMPretrain's table of models.
"""

from pathlib import Path

from mmpretrain.apis.model import ModelHub

import mmvssm
from mmvssm import zoo

# mmengine then loads names of the zoo.
from mmvssm.engine.checkpoints import loaders as loaders

_ROOT = Path(mmvssm.__file__).parent / '.mim'
_METAFILE = _ROOT / 'configs' / 'classification' / 'metafile.yml'


def register_models() -> None:
    """Add the models to MMPretrain's table. Calling it again changes nothing."""
    known = set(ModelHub._models_dict)
    if zoo.TABLE.keys() & known:
        return
    ModelHub.register_model_index(_METAFILE, config_prefix=_ROOT)
    for name in set(ModelHub._models_dict) - known:
        model = ModelHub._models_dict[name]
        if model.weights is not None:
            # Through the zoo: from its cache, the right copy, and read safely.
            model.weights = f'{zoo.SCHEME}{name}'


register_models()
