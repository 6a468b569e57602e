from .direction import Direction
from .op import bidirectional_scan

__all__ = ['Direction', 'bidirectional_scan']
