"""Modules that have moved, by their old names: imports of them, and pickles of their classes, go on working."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "fusedopt.closed_forms": "fusedopt.schedules.forms",
    "fusedopt.demo_text": "fusedopt.demo.text",
    "fusedopt.keras_schedules": "fusedopt.keras.schedules",
    "fusedopt.metric_schedules": "fusedopt.schedules.metric",
    "fusedopt.plotting": "fusedopt.schedules.plotting",
    "fusedopt.recorder": "fusedopt.schedules.recorder",
    "fusedopt.schedule_functions": "fusedopt.schedules.functions",
    "fusedopt.verification": "fusedopt.schedules.verification",
}


class _OldNames(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])


sys.meta_path.insert(0, _OldNames())
