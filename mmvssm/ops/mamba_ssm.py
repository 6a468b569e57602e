"""Whether the scan of the package mamba_ssm can run here, and the function itself.

This package does not depend on it. Its compiled module, ``selective_scan_cuda``, is
separate: releases since 2.3.2 install it only if they are built with
``MAMBA_KEEP_CUDA_BUILD=TRUE``.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from mmvssm.ops.typed import assume_constant_result

_HOW = (
    'MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-binary '
    'mamba-ssm mamba-ssm'
)


def scan_function() -> Callable[..., Any]:
    """``selective_scan_fn`` of mamba_ssm.

    Raises:
        ImportError: The package or its compiled module is missing or broken; the
            message says which.
    """
    found = _found()
    if isinstance(found, str):
        raise ImportError(found)
    return found


# Called for every op, and a failed import is slow.
@cache
def _found() -> Callable[..., Any] | str:
    """The function, or why there is none."""
    try:
        import_module('mamba_ssm')
    except ModuleNotFoundError as error:
        if error.name == 'mamba_ssm':
            return f'mamba_ssm is not installed ({_HOW})'
        # Its __init__ imports all of its layers, and these import the kernels.
        if error.name != 'selective_scan_cuda':
            return f'mamba_ssm cannot be imported: {error}'
    except Exception as error:
        return f'mamba_ssm cannot be imported: {error}'
    try:
        import_module('selective_scan_cuda')
    except ModuleNotFoundError:
        return (
            f'mamba_ssm is installed without its compiled module '
            f'selective_scan_cuda, as releases since 2.3.2 are by default ({_HOW})'
        )
    except Exception as error:
        return (
            f'selective_scan_cuda of mamba_ssm cannot be loaded, perhaps because it '
            f'was built for another torch than {torch.__version__}: {error}'
        )
    try:
        interface = import_module('mamba_ssm.ops.selective_scan_interface')
        function: Callable[..., Any] = interface.selective_scan_fn
    except Exception as error:
        return f'mamba_ssm has no selective_scan_fn: {error}'
    return function


# torch.compile asks once and does not trace what follows.
@assume_constant_result
def unavailable() -> str | None:
    """Why mamba_ssm's scan cannot run here, or None."""
    found = _found()
    if isinstance(found, str):
        return found
    if not torch.cuda.is_available():
        return 'torch sees no CUDA device'
    return None
