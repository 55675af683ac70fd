"""The optimizers and schedules of Hugging Face transformers for PyTorch, fused into a handful of Triton launches."""

from typing import TYPE_CHECKING

from fusedopt.moved import MOVED as _MOVED

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fusedopt.public import *  # noqa: F403
    from fusedopt.schedules.base import Schedule as Schedule
    from fusedopt.schedules.forms import *  # noqa: F403
    from fusedopt.schedules.functions import *  # noqa: F403
    from fusedopt.schedules.metric import *  # noqa: F403
    from fusedopt.schedules.registry import *  # noqa: F403
else:
    # The first name that is asked for imports all of them, and torch. Before that the command line can settle what
    # torch reads from the environment when it is imported, and answer Ctrl-C while it is.
    def __getattr__(name):
        if name == "__all__" or not name.startswith("__"):
            from importlib import import_module
            from pkgutil import iter_modules

            # A module of ours, perhaps on the way to those names.
            if f"fusedopt.{name}" in _MOVED or name in [module.name for module in iter_modules(__path__)]:  # noqa: F405
                return import_module(f"fusedopt.{name}")
            public = import_module("fusedopt.public")
            globals().update({known: getattr(public, known) for known in public.__all__})
            globals()["__all__"] = ["__version__", *public.__all__]
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
