"""The scans, each behind one public function with several backends."""

from .add_norm import add_rms_norm
from .backends import (
    BackendUnavailableError,
    Supplier,
    backend_status,
    backend_summary,
    choose_backend,
    explain_backend,
    list_backends,
    use_backend,
)
from .bidirectional_scan import Direction, bidirectional_scan
from .contract import Backend, Composed, KernelBackend, Result
from .cross_scan import cross_merge, cross_scan
from .gpu_check import choice as _choice
from .gpu_check import run as _run
from .linear import linear
from .linear_attention import linear_attention
from .registration import Registration, register_backend
from .scan_orders import list_scan_orders, register_scan_order, scan_order
from .selective_scan import selective_scan
from .ss2d_scan import ss2d_scan

# The first call that could use kernels without a verdict has them checked.
_choice.set_check(_run.ensure_op)

__all__ = [
    'KernelBackend',
    'Backend',
    'BackendUnavailableError',
    'Composed',
    'Direction',
    'Registration',
    'Result',
    'Supplier',
    'add_rms_norm',
    'backend_status',
    'backend_summary',
    'bidirectional_scan',
    'choose_backend',
    'cross_merge',
    'cross_scan',
    'explain_backend',
    'linear',
    'linear_attention',
    'list_backends',
    'list_scan_orders',
    'register_backend',
    'register_scan_order',
    'scan_order',
    'selective_scan',
    'ss2d_scan',
    'use_backend',
]
