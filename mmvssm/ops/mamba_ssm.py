"""Whether the scan of the package mamba_ssm can run here, and the function itself.

It is no dependency. Its compiled module, ``selective_scan_cuda``, is a part of
its own: releases since 2.3.2 install it only when built with
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


@cache
def scan_function() -> Callable[..., Any]:
    """``selective_scan_fn`` of mamba_ssm.

    Raises:
        ImportError: The package or its compiled module is missing or broken; the
            message says which.
    """
    try:
        import_module('mamba_ssm')
    except ModuleNotFoundError as error:
        if error.name == 'mamba_ssm':
            raise ImportError(f'mamba_ssm is not installed ({_HOW})') from None
        # Its first lines import all of its layers, and these the kernels.
        if error.name != 'selective_scan_cuda':
            raise ImportError(f'mamba_ssm cannot be imported: {error}') from error
    except Exception as error:
        raise ImportError(f'mamba_ssm cannot be imported: {error}') from error
    try:
        import_module('selective_scan_cuda')
    except ModuleNotFoundError:
        raise ImportError(
            f'mamba_ssm is installed without its compiled module '
            f'selective_scan_cuda, as releases since 2.3.2 are by default ({_HOW})'
        ) from None
    except Exception as error:
        raise ImportError(
            f'selective_scan_cuda of mamba_ssm cannot be loaded, perhaps because it '
            f'was built for another torch than {torch.__version__}: {error}'
        ) from error
    try:
        interface = import_module('mamba_ssm.ops.selective_scan_interface')
        found: Callable[..., Any] = interface.selective_scan_fn
        return found
    except Exception as error:
        raise ImportError(
            f'mamba_ssm has no selective_scan_fn to import: {error}'
        ) from error


# torch.compile asks once and does not trace what follows.
@assume_constant_result
def unavailable() -> str | None:
    """Why mamba_ssm's scan cannot run here, or None."""
    try:
        scan_function()
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return 'torch sees no CUDA device'
    return None
