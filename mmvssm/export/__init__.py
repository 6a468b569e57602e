"""Export of models to other runtimes: torch.export and ONNX."""

from .errors import DifferenceError, ExportError
from .onnx_model import to_onnx

__all__ = ['DifferenceError', 'ExportError', 'to_onnx']
