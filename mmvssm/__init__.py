"""Visual state-space backbones for mmsegmentation and mmdetection."""
from mmvssm import compat

__version__ = '0.1.0'

compat.apply()
