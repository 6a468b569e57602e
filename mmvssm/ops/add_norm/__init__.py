from .op import add_rms_norm

__all__ = ['add_rms_norm']
