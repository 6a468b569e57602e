"""Published weights by name: what there is, where it comes from, where it lies.

``python -m mmvssm.zoo list`` shows all of it.
"""

from mmvssm.zoo.download import HF_SCHEME, fetch, is_address, path_of, verify
from mmvssm.zoo.table import SCHEME, TABLE, Crop, Weights, find, of_config

__all__ = [
    'HF_SCHEME',
    'SCHEME',
    'TABLE',
    'Crop',
    'Weights',
    'fetch',
    'find',
    'is_address',
    'of_config',
    'path_of',
    'verify',
]
