from .op import linear_attention

__all__ = ['linear_attention']
