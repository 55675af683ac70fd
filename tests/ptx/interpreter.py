"""Triton's interpreter beside compiled kernels: the model of every launch, from the same memory.

A process has its kernels either compiled or interpreted, by what `triton.jit` made of them when they were imported. So
they are imported twice here, and the language is patched while the second copy runs.
"""

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from ptx.memory import BASE, Journal, Registry, Written

PACKAGE = "fusedopt_kernels"


class Expected(NamedTuple):
    """What a launch is to do.

    Attributes:
        written: memory as it leaves it.
        registry: of what it may touch, which is what the interpreter touches.
    """

    written: Written
    registry: Registry


def interpreted(jit: Any, grid: tuple[int, ...], args: Any, kwargs: dict[str, Any], registry: Registry) -> Expected:
    """Returns what the interpreter does at a launch of this kernel; memory stays as it is.

    Raises:
        IndexError: it leaves the memory of the registry.
    """
    journal = Journal()
    memory = _Memory(registry, journal)
    kernel = getattr(_second_copy()[jit.fn.__module__], jit.fn.__name__)
    watched = mock.patch.object(interpreter, "_interpreter", memory)
    with _language_of_the_interpreter(), watched, np.errstate(all="ignore"):
        kernel.run(*args, grid=grid, warmup=False, **kwargs)
    written = journal.written()
    journal.undo()
    return Expected(written, Registry(registry.touched))


class _Memory:
    """The interpreter's access to memory, watched."""

    def __init__(self, registry: Registry, journal: Journal) -> None:
        self.registry, self.journal = registry, journal
        self._actual = interpreter._interpreter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actual, name)

    def load(self, at: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.registry.touch(at[np.broadcast_to(mask, at.shape)], np.dtype(dtype).itemsize)
        return self._actual.load(at, mask, other, dtype)

    def store(self, at: Any, value: Any, mask: Any) -> Any:
        size, active = value.dtype.itemsize, at[np.broadcast_to(mask, at.shape)]
        self.registry.touch(active, size)
        self.journal.note(size, ((active - np.uint64(BASE)) // np.uint64(size)).astype(np.int64))
        return self._actual.store(at, value, mask)


@cache
def _second_copy() -> dict[str, Any]:
    """The modules of the kernels by name, to be interpreted."""
    compiled = _without_kernels()
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            package = importlib.import_module(PACKAGE)
            for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
                importlib.import_module(module.name)
        return _without_kernels()
    finally:
        sys.modules.update(compiled)


def _without_kernels() -> dict[str, Any]:
    """Takes the modules of the kernels out of those that are imported."""
    names = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def _language_of_the_interpreter() -> Iterator[None]:
    """Inside, `triton.language` is what it is to the interpreter, which would leave a part of it like that."""
    scopes: list[_Scope] = []
    # Without checks for integers that overflow, which take as long as the rest of a kernel.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_LangPatchScope", lambda: _Scope(scopes)),
        mock.patch.object(interpreter.interpreter_builder, "options", options),
    ):
        try:
            interpreter._patch_lang(vars(standard)["sum"].fn)
            standard_functions = _Scope(scopes)
            functions: dict[str, Any] = vars(standard)  # of which a process has one copy, which is compiled
            for name, function in functions.items():
                if isinstance(function, JITFunction) and getattr(tl, name, standard) is function:
                    standard_functions.set_attr(tl, name, function.fn)
            yield
        finally:
            for scope in reversed(scopes):
                scope.undo()


class _Scope(interpreter._LangPatchScope):  # type: ignore[misc]  # which has no types
    """Patches of the language, which are taken back in the reverse order of all scopes."""

    def __init__(self, scopes: "list[_Scope]") -> None:
        super().__init__()
        scopes.append(self)

    def restore(self) -> None:
        pass

    def undo(self) -> None:
        super().restore()
