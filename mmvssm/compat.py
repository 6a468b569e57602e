"""Every shim for a version of torch, mmengine, mmcv, mmseg or mmdet.

Importing ``mmvssm`` calls :func:`apply` once. Nothing outside this module may
look at a version number or patch somebody else's module.
"""
import re

import mmengine.config.config as mmengine_config
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.utils import is_installed

_FLAT_CONFIG = re.compile(r'^(mmvssm)::([\w.-]+)$')


def _register_config_scopes() -> None:
    """Let ``_base_ = 'mmvssm::...'`` and ``'mmseg::...'`` be found.

    mmengine looks a scope up in a fixed table of distributions. This package
    is not in it, and the maintained fork of mmsegmentation has a distribution
    name of its own; the import name works for both the fork and the original.
    """
    MODULE2PACKAGE['mmvssm'] = 'mmvssm'
    if not is_installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _accept_flat_configs() -> None:
    """Accept ``mmvssm::upernet_vmamba_t.py``, a config in no sub-folder.

    mmengine insists on a ``/`` after the ``::``, but ``configs/`` of this
    package is flat.
    """
    split = mmengine_config._get_package_and_cfg_path
    if getattr(split, 'accepts_flat_configs', False):
        return

    def split_flat(cfg_path: str) -> tuple[str, str]:
        match = _FLAT_CONFIG.match(cfg_path)
        return match.groups() if match else split(cfg_path)

    split_flat.accepts_flat_configs = True
    mmengine_config._get_package_and_cfg_path = split_flat


def _allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's own checkpoints.

    They hold the message hub's ``HistoryBuffer``, which mmengine up to 0.10.7
    does not declare as safe.
    """
    import numpy as np
    allowed = [HistoryBuffer, np.ndarray, np.dtype]
    allowed += [getattr(np.dtypes, name) for name in
                ('Float64DType', 'Float32DType', 'Int64DType')
                if hasattr(np, 'dtypes')]
    core = getattr(np, '_core', None) or np.core
    allowed.append(core.multiarray._reconstruct)
    torch.serialization.add_safe_globals(allowed)


def apply() -> None:
    """Apply every shim. Calling it again changes nothing."""
    _register_config_scopes()
    _accept_flat_configs()
    _allow_mmengine_checkpoints()
