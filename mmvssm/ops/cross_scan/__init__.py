from .op import NUM_ROUTES, cross_merge, cross_scan, take_routes

__all__ = ['NUM_ROUTES', 'cross_merge', 'cross_scan', 'take_routes']
