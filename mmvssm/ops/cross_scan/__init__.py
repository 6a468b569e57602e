from .op import cross_merge, cross_scan, take_routes

__all__ = ['cross_merge', 'cross_scan', 'take_routes']
