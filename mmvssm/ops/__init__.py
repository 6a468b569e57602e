"""The scans, each behind one public function with several backends."""

from .backends import (
    BackendUnavailableError,
    backend_status,
    backend_summary,
    choose_backend,
    list_backends,
    use_backend,
)
from .cross_scan import cross_merge, cross_scan
from .selective_scan import selective_scan
from .ss2d_scan import ss2d_scan

__all__ = [
    'BackendUnavailableError',
    'backend_status',
    'backend_summary',
    'choose_backend',
    'cross_merge',
    'cross_scan',
    'list_backends',
    'selective_scan',
    'ss2d_scan',
    'use_backend',
]
