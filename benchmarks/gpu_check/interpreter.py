"""Triton's interpreter, made to compute as a GPU does."""

import contextlib
import importlib
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def interpreting_as_a_gpu() -> Iterator[None]:
    """Mend what Triton's interpreter does otherwise, while this is open.

    It keeps bfloat16 as its bits, multiplies those, and cuts where a GPU rounds. That of Triton 3.6 counts with arrays
    of one number, which numpy 2.4 no longer takes for a number. And it prepares the language anew for
    every function that a kernel calls, which takes a quarter of its time and changes nothing for the kernel's own.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    handle_of, language = interpreter.TensorHandle, interpreter.tl
    dot, cast, call = builder.create_dot, builder.cast_impl, function.__call__
    patch_tensor = interpreter._patch_lang_tensor

    def values(handle):
        if handle.dtype.scalar != language.bfloat16:
            return handle
        return handle_of((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), language.float32)

    def rounding_cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16()
        return handle_of(rounded.view(torch.int16).numpy().view(numpy.uint16), target.scalar)

    def quick_call(self, *arguments, **keywords):
        if self.fn.__module__.startswith("triton."):  # Triton's own functions see the language through other names
            return call(self, *arguments, **keywords)
        return self.rewrite()(*arguments, **keywords)

    def patch_tensor_and_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        for one in scope:  # which older versions have not
            one.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.create_dot = lambda self, a, b, *rest: dot(self, values(a), values(b), *rest)
    builder.cast_impl, function.__call__ = rounding_cast, quick_call
    interpreter._patch_lang_tensor = patch_tensor_and_index
    try:
        yield
    finally:
        builder.create_dot, builder.cast_impl, function.__call__ = dot, cast, call
        interpreter._patch_lang_tensor = patch_tensor
