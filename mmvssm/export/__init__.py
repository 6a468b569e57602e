"""Export of models to other runtimes: torch.export and ONNX."""

from .errors import DifferenceError, ExportError
from .onnx_model import to_onnx
from .program import to_exported_program
from .torch_library import torch_library

__all__ = [
    'DifferenceError',
    'ExportError',
    'to_exported_program',
    'to_onnx',
    'torch_library',
]
