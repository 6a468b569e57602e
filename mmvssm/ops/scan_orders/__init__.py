from . import builtin  # noqa: F401  registers the orders that come with the package
from .registry import (
    DEFAULT,
    NO_ROUTE,
    NUM_ROUTES,
    Orders,
    count_orders,
    is_cross,
    list_scan_orders,
    register_scan_order,
    scan_order,
)
from .tables import KernelOrders, kernel_orders

__all__ = [
    'DEFAULT',
    'NO_ROUTE',
    'NUM_ROUTES',
    'KernelOrders',
    'Orders',
    'count_orders',
    'is_cross',
    'kernel_orders',
    'list_scan_orders',
    'register_scan_order',
    'scan_order',
]
