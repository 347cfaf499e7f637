"""Compiled modules: those of this installation, or others that a path names."""

from __future__ import annotations

import importlib.util
from types import ModuleType


def load(name: str, path: str | None = None) -> ModuleType:
    """The compiled module ``name`` of this installation, or of the file ``path``.

    One per process: Python hands out the first one again, whatever the path.

    Raises:
        ImportError: there is none, or it does not fit this Python.
    """
    if path is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a compiled module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
