"""Linear attention by compiled CPU kernels, forward and backward.

Elu, rotation, products and normaliser of some positions are computed at once. The sums
over the keys are kept for the backward pass, which recomputes the rest. The kernels are
in ``mmvssm/ops/cpu/``.
"""

from ctypes import byref

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import KernelBackend, Outputs, Result
from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Array, AttentionArgs
from mmvssm.ops.kernel_args import parameter, pointer, readable
from mmvssm.ops.linear_attention.declaration import AttentionInputs, AttentionOptions


class CpuAttention(KernelBackend):
    """One pass over keys and values and one over queries, each way."""

    supplier = backends.CPU

    def refuses(self, inputs: AttentionInputs, options: AttentionOptions) -> str | None:
        """It computes in float32."""
        if options.dtype != torch.float32:
            return f'it computes in float32, not {options.dtype}'
        return None

    def forward(
        self, inputs: AttentionInputs, options: AttentionOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.linear_attention`."""
        v = inputs.v
        y = v.new_empty(v.shape, dtype=options.out_dtype)
        out = y if y.dtype in Array.dtypes else torch.empty_like(y, dtype=torch.float32)
        (sums,) = saved = self.saved_like(inputs, options)
        read = _read(inputs)
        args = AttentionArgs(
            **_input_args(read, options), out=Array.of(out), sums=pointer(sums)
        )
        library.kernel('attention_forward')(byref(args), library.parallel_for())
        y = out.to(y.dtype)
        return Result((y,), saved if keep else (), has_nan=False)

    def saved_like(self, inputs: AttentionInputs, options: AttentionOptions) -> Outputs:
        """Memory for mean keys, and mean products of values and keys, of each head."""
        q, _, v, *_ = inputs
        keys, values = (_in_panels(x.shape[2] // options.heads) for x in (q, v))
        shape = q.shape[0], options.heads, 1 + values, keys
        return (q.new_empty(shape, dtype=torch.float32),)

    def backward(
        self,
        inputs: AttentionInputs,
        options: AttentionOptions,
        saved: Outputs,
        grads: tuple[Tensor | None, ...],
        wanted: AttentionInputs,
    ) -> AttentionInputs:
        """All gradients."""
        grad, (sums,) = grads[0], saved
        assert grad is not None, 'there is one output'
        grad, read = _neighbours(grad), _read(inputs)
        q, k, v = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in read[:3]
        )
        by_sums = torch.empty_like(sums)
        args = AttentionArgs(
            **_input_args(read, options),
            sums=pointer(sums),
            grad_sums=pointer(by_sums),
            grad_out=Array.of(grad),
            grad_q=Array.of(q),
            grad_k=Array.of(k),
            grad_v=Array.of(v),
        )
        library.kernel('attention_backward')(byref(args), library.parallel_for())
        return AttentionInputs(q, k, v)


def _in_panels(channels: int) -> int:
    """The columns of all panels that the channels fill."""
    return -(-channels // library.panel_columns()) * library.panel_columns()


def _read(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs as the kernels read them."""
    q, k, v = (_neighbours(x) for x in inputs[:3])
    return AttentionInputs(q, k, v, parameter(inputs.cos), parameter(inputs.sin))


def _neighbours(x: Tensor) -> Tensor:
    """The tensor (B, L, C) with neighbouring channels, in a dtype for the kernels."""
    x = readable(x, Array)
    return x if x.stride(2) == 1 else x.contiguous()


def _input_args(
    inputs: AttentionInputs, options: AttentionOptions
) -> dict[str, object]:
    """The kernel args that both passes have."""
    q, k, v, cosine, sine = inputs
    batch, length, channels = q.shape
    return dict(
        batch=batch,
        heads=options.heads,
        length=length,
        keys=channels // options.heads,
        values=v.shape[2] // options.heads,
        normalise=options.normalise,
        eps=options.eps,
        q=Array.of(q),
        k=Array.of(k),
        v=Array.of(v),
        cosine=pointer(cosine),
        sine=pointer(sine),
    )
