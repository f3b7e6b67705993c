"""Reads what a function returned, whatever that is, and measures how far it is from what was expected."""

import inspect
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.study.guard import Raised


@dataclass(frozen=True)
class Out:
    """One returned value: in words, and as a copy where shape and dtype are those expected."""

    text: str
    value: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What one call did.

    `problem` says what is wrong with the result apart from its numbers, `misfit` what is wrong with the function's
    parameters (it was not called then), `changed` names the arguments that were edited in place.
    """

    outs: tuple[Out, ...] = ()
    problem: str | None = None
    changed: tuple[str, ...] = ()
    raised: Raised | None = None
    misfit: str | None = None
    printed: str = ""


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the expected one: the largest error, its index, and whether all of it is close enough.

    Where some values are too far off, the largest error is that of one of them.
    """

    error: float
    index: tuple[int, ...]
    close: bool


@dataclass(frozen=True)
class Tolerance:
    """Largest error allowed: atol + rtol * |expected|, and one rounding step of the dtype; none for integers.

    NaN agrees with NaN, and inf with inf of the same sign.
    """

    rtol: float
    atol: float

    def difference(self, expected: Tensor, got: Tensor) -> Difference:
        """Of two tensors of one shape and dtype."""
        if torch.equal(expected, got):
            return Difference(0.0, (0,) * expected.dim() if expected.numel() else (), True)
        error = errors(expected, got)
        if expected.is_floating_point() or expected.is_complex():
            rtol = max(self.rtol, torch.finfo(expected.dtype).eps)  # two right results may round to neighbours
            allowed = (self.atol + rtol * wide(expected).abs()).nan_to_num(0.0, 0.0)  # nothing is close to inf or NaN
            far = error > allowed
        else:
            far = error > 0
        close = not bool(far.any())
        at = int((error if close else error.masked_fill(~far, -1.0)).argmax())
        index = tuple(int(i) for i in np.unravel_index(at, tuple(error.shape)))
        return Difference(error[index].item(), index, close)

    def alike(self, one: Outcome, other: Outcome) -> bool:
        """Whether two calls did the same: the same values, or the same kind of exception."""
        if one.raised or other.raised:
            return bool(one.raised and other.raised) and one.raised.kind == other.raised.kind  # type: ignore[union-attr]
        if one.misfit or other.misfit:
            return one.misfit == other.misfit
        if one.changed != other.changed or [out.text for out in one.outs] != [out.text for out in other.outs]:
            return False
        pairs = [(a.value, b.value) for a, b in zip(one.outs, other.outs, strict=True)]
        return all(a is b or (a is not None and b is not None and self.difference(a, b).close) for a, b in pairs)


def wide(tensor: Tensor) -> Tensor:
    """The same numbers in float64 or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def errors(expected: Tensor, got: Tensor) -> Tensor:
    """|got - expected| in float64: 0 where both are NaN or the same infinity, inf where only one is."""
    same = (got == expected) | ((got != got) & (expected != expected))
    return (wide(got) - wide(expected)).abs().nan_to_num(math.inf, math.inf).masked_fill(same, 0.0)


def describe(value: Any) -> str:
    """A returned value in words, without its contents: "float32[2, 3]", "None", "numpy.ndarray"."""
    with suppress(Exception):  # a subclass may refuse to be asked
        if isinstance(value, Tensor) and not value.is_nested:
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list) and len(value) <= 4:
        return f"{type(value).__name__} of {', '.join(map(describe, value)) or 'nothing'}"
    if value is None:
        return "None"
    module = type(value).__module__
    return type(value).__name__ if module in ("builtins", "__main__") else f"{module}.{type(value).__name__}"


def unpack(value: Any, names: Sequence[str]) -> tuple[tuple[Any, ...] | None, str | None]:
    """The returned values in order, or what is wrong with their number."""
    asked = names[0] if len(names) == 1 else f"({', '.join(names)})"
    if value is None:
        return None, f"It returns None: `return {asked}` is missing."
    if inspect.iscoroutine(value):
        value.close()
        return None, "It is an `async def`; a plain function is asked."
    if inspect.isgenerator(value):
        return None, "It has a `yield`, so it returns a generator; `return` is asked."
    if len(names) == 1:
        if isinstance(value, tuple | list):
            return None, f"It returns {describe(value)}; one tensor is asked: {asked}."
        return (value,), None
    if not isinstance(value, tuple | list):
        return None, f"It returns {describe(value)}; {len(names)} tensors are asked: {asked}."
    if len(value) != len(names):
        return None, f"It returns {len(value)} values; {len(names)} are asked: {asked}."
    return tuple(value), None


def read(value: Any, expected: Sequence[Tensor], names: Sequence[str]) -> tuple[tuple[Out, ...], str | None]:
    """The returned values and what is wrong with their number, types, shapes or dtypes."""
    values, problem = unpack(value, names)
    if values is None:
        return (Out(describe(value)),), problem
    problems, outs = [], []
    for name, got, asked in zip(names, values, expected, strict=True):
        copy, text = None, f"{name} {type(got).__name__}"
        try:
            problem, text = _problem(name, got, asked), f"{name} {describe(got)}"
            if problem is None:
                copy = got.detach().as_subclass(Tensor).clone().resolve_conj().resolve_neg()
        except Exception as error:  # a tensor without values, such as one of a fake mode, or something very strange
            problem = f"{name} can not be read: {type(error).__name__}."
        problems.append(problem)
        outs.append(Out(text, copy))
    return tuple(outs), next(filter(None, problems), None)


def _problem(name: str, got: Any, asked: Tensor) -> str | None:
    if not isinstance(got, Tensor):
        return f"{name} is {describe(got)}; a torch.Tensor is asked."
    if got.device.type != "cpu" or got.layout != torch.strided:
        return f"{name} is a {got.layout} tensor on {got.device}; an ordinary one on the inputs' device is asked."
    if got.shape != asked.shape:
        return f"{name} has shape {list(got.shape)}; {list(asked.shape)} is asked."
    if got.dtype != asked.dtype:
        return f"{name} is {str(got.dtype)[6:]}; {str(asked.dtype)[6:]} is asked."
    return None


def same_input(before: Any, after: Any) -> bool:
    """Whether an argument still holds what it held before the call."""
    if isinstance(before, Tensor):
        return (
            isinstance(after, Tensor)
            and (before.shape, before.dtype, before.layout) == (after.shape, after.dtype, after.layout)
            and (torch.equal(before, after) or not bool(errors(before.detach(), after.detach()).any()))
        )
    if isinstance(before, tuple | list):
        return type(before) is type(after) and len(before) == len(after) and all(map(same_input, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same_input(before[key], after[key]) for key in before)
    return not isinstance(before, bool | int | float | str) or before == after
