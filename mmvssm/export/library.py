"""The compiled CPU kernels for onnxruntime."""

from mmvssm.ops import BackendUnavailableError
from mmvssm.ops.cpu import library


def onnx_library() -> str:
    """Path of a library with which onnxruntime runs our compiled CPU kernels.

    A file exported with the form ``'function'`` has one node for each of our ops. With
    this library onnxruntime runs the kernel of the op there; without it, the standard
    operators that the file has for it. Results have the same bits at any number of
    threads. The kernels run on the threads of the session. Tensors are float32::

        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(mmvssm.onnx_library())
        session = onnxruntime.InferenceSession('model.onnx', options)
        (logits,) = session.run(None, {'image': image})

    The library needs neither torch nor Python, only onnxruntime 1.17 or newer. So it
    can be copied to a machine of the same kind where mmvssm is not installed. It uses
    the best instruction set of the machine, or the one that ``MMVSSM_CPU_ISA`` names.

    Raises:
        BackendUnavailableError: The kernels were not compiled when mmvssm was
            installed, or are those of another version.
    """
    reason = library.no_onnx_operators()
    if reason is not None:
        raise BackendUnavailableError(
            f"onnxruntime cannot use mmvssm's compiled kernels: {reason}"
        )
    return library.path()
