"""Triton's interpreter, patched so that it computes what a GPU computes.

Stock (3.6 to 3.9), it is silently wrong: bf16 is kept as raw bits, which products and sums take for
integers; fp32 to bf16 truncates; tf32 products keep all bits; a comparison of scalars is an
integer where a block is masked with it; and before 3.9 there is no bf16 constant. `self_check`
must pass before any kernel is believed; test_interpreter.py runs it.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.jit import JITFunction


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def as_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 truncated, not rounded, to the 10 mantissa bits that a tensor core uses."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def up(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle


def in_fp32(method, operands: int):
    """`method` with its bf16 operands widened, and the result rounded to bf16 once.

    A comparison is an int1; stock, it goes by the dtype of what it compares.
    """

    def fixed(self, *arguments):
        handles, others = arguments[:operands], arguments[operands:]
        out = method(self, *map(up, handles), *others)
        if out.data.dtype == np.bool_:
            return TensorHandle(out.data, tl.int1)
        if any(map(is_bf16, handles)):
            return TensorHandle(narrowed(out.data), tl.bfloat16)
        return out

    return fixed


def fixed_cast(method):
    def cast(self, source: TensorHandle, to):
        if source.dtype.scalar == to.scalar or not (is_bf16(source) or to.scalar == tl.bfloat16):
            return method(self, source, to)
        if is_bf16(source):
            wide = up(source)
            return wide if to.scalar == tl.float32 else method(self, wide, to)
        return TensorHandle(narrowed(source.data.astype(np.float32)), tl.bfloat16)

    return cast


def fixed_dot(method):
    def dot(self, a, b, d, precision, *others):
        a, b = up(a), up(b)
        if a.dtype.scalar == tl.float32 and str(precision).endswith("TF32"):
            a, b = (TensorHandle(as_tf32(x.data), tl.float32) for x in (a, b))
        return method(self, a, b, d, precision, *others)

    return dot


def only_where_needed(patch_language):
    """Stock, every call of a device function goes through triton.language to patch it once more."""

    @functools.cache
    def languages(function) -> list:
        return [each for each in function.__globals__.values() if each is tl or each is tl.core]

    def patch(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch_language(function)
        return stock._LangPatchScope()  # with nothing to restore

    return patch


JITTED = ("triton.language", "qwen3next_plugin.kernels")  # where functions to interpret are


@functools.cache
def fix() -> None:
    """Patch the interpreter of this process, once, and check the result."""
    stock._patch_lang = only_where_needed(stock._patch_lang)
    Builder.create_dot = fixed_dot(Builder.create_dot)
    Builder.cast_impl = fixed_cast(Builder.cast_impl)
    Builder.binary_op = in_fp32(Builder.binary_op, 2)
    Builder.unary_op = in_fp32(Builder.unary_op, 1)
    Builder.create_fma = in_fp32(Builder.create_fma, 3)
    Builder.get_bf16 = lambda self, x: TensorHandle(narrowed(np.array([x])), tl.bfloat16)
    self_check()


@contextmanager
def interpreting() -> Iterator[None]:
    """Within this context our kernels, and Triton's own functions that they call, run on the CPU.

    TRITON_INTERPRET=1 does that, too, but for all that a process and its children import.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith(JITTED)]
    compiled = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        for module, name, value in compiled:
            setattr(module, name, InterpretedFunction(value.fn))
        try:
            fix()
            yield
        finally:
            for module, name, value in compiled:
                setattr(module, name, value)


_FOR_EVER = ExitStack()


def interpret() -> None:
    """The same from now on, in this process and in its forks."""
    _FOR_EVER.enter_context(interpreting())


def _everything(x, y, sums, products, below, N: tl.constexpr):
    at = tl.arange(0, N)
    square = at[:, None] * N + at[None, :]
    a, b = tl.load(x + square), tl.load(y + square)
    tl.store(sums + square, a * b + a)
    tl.store(products + square, tl.dot(a, b, input_precision="tf32"))
    first = tl.load(x)
    tl.store(below + at, 1.0, mask=(at < N // 2) & (first > first - 1))


def self_check() -> None:
    """Raise AssertionError unless the interpreter rounds as a GPU does."""
    N, generator = 16, torch.Generator().manual_seed(3)
    kernel = triton.jit(_everything)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, y = torch.randn(2, N, N, generator=generator).to(dtype)
        sums, products = torch.empty(N, N, dtype=dtype), torch.empty(N, N)
        below = torch.zeros(N)
        kernel[(1,)](x, y, sums, products, below, N=N)
        expected = (x * y).to(dtype) + x
        assert torch.equal(sums, expected), dtype
        exact = x.double() @ y.double()
        if dtype == torch.float32:
            a, b = (torch.from_numpy(as_tf32(m.numpy())).double() for m in (x, y))
            assert (products - exact).abs().max() > 1e-5, "tf32 operands are not rounded"
            exact = a @ b
        torch.testing.assert_close(products.double(), exact, rtol=1e-5, atol=1e-5)
        assert below.tolist() == [1.0] * (N // 2) + [0.0] * (N // 2)
    special = torch.tensor([1.00390625, 1.01171875, float("nan"), float("inf"), -3e38])
    narrow = torch.from_numpy(narrowed(special.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(narrow, special.bfloat16(), rtol=0, atol=0, equal_nan=True)
