"""Triton's interpreter, without half of what it spends its time on.

None of it changes what an operation computes.
"""

from contextlib import contextmanager
from math import prod
from types import SimpleNamespace

import pytest


@contextmanager
def quick_interpreter():
    """Within the block, of Triton as it is imported with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        _prepare_once_a_launch(patch, interpreter, tl)
        _look_dtypes_up(patch, interpreter, tl)
        _share_shapes(patch, tl)
        yield


def _prepare_once_a_launch(patch, interpreter, tl):
    """Functions within a kernel find the module ``triton.language`` prepared.

    The interpreter prepares it for a launch, and once more for every call of a
    function. Triton's own functions know it as ``triton.language.core``.
    """
    scope = interpreter._patch_lang(SimpleNamespace(__globals__=dict(core=tl.core)))
    for item, name, before in scope._changes:
        now = getattr(item, name)
        setattr(item, name, before)
        patch.setattr(item, name, now)

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    patch.setattr(interpreter.InterpretedFunction, '__call__', call)


def _look_dtypes_up(patch, interpreter, tl):
    """The interpreter makes a table of all dtypes whenever it needs one."""
    make, found = interpreter._get_np_dtype, {}

    def get(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = make(dtype.scalar)
        return found[name]

    patch.setattr(interpreter, '_get_np_dtype', get)


def _share_shapes(patch, tl):
    """Tensors of the same shape share it, and it is compared with a list as it is."""
    found, equal = {}, tl.core.tuple.__eq__

    def init(self, handle, type):
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in found:
            constants = [tl.constexpr(size) for size in sizes]
            found[sizes] = tl.constexpr(prod(sizes)), tl.core.tuple(constants)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = found[sizes]

    def compare(self, other):
        if isinstance(other, list):
            return tl.constexpr(self.values == other)
        return equal(self, other)

    patch.setattr(tl.core.tensor, '__init__', init)
    patch.setattr(tl.core.tuple, '__eq__', compare)
