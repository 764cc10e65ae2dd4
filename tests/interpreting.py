"""Triton's interpreter as the tests run it: it rounds as a GPU does, and spares what it would repeat."""

from __future__ import annotations

import dataclasses
import functools


def prepare() -> None:
    """Once, before the first kernel runs; without Triton nothing happens."""
    try:
        import numpy  # noqa: F401
        import triton.runtime.interpreter  # noqa: F401
    except ImportError:
        return
    _round_as_a_gpu_does()
    _spare_repetitions()


def _round_as_a_gpu_does() -> None:
    """The interpreter adds float32 in line, where a GPU adds in a tree, and cuts bfloat16 off."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), kind.scalar)
        return cast(self, source, kind)

    def tree_sum(self, input):
        data = np.ascontiguousarray(np.moveaxis(input.handle.data, self.axis, -1))
        total = np.sum(data, axis=-1)
        return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, input.dtype)

    ReduceOps.sum = tree_sum
    InterpreterBuilder.cast_impl = rounding_cast


def _spare_repetitions() -> None:
    """About half of the interpreter's time, and no number depends on it."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function):
        """A kernel has the functions of Triton's language replaced as it starts, each helper would again."""
        if any(map(tl.core.is_builtin, (tl.load, tl.core.load))):
            return replace(function)
        return None

    interpreter._patch_lang = replace_once
    number = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: number(tl.uint64 if kind.scalar.is_ptr() else kind.scalar)
    # The overflow of an integer is computed, and then looked at in debug mode only.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
