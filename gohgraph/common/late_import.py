"""Acting on a package when, and only when, somebody imports it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, act: Callable[[], Any]) -> None:
    """Calls `act` once the module of that name has been imported: now, if it has been already.

    Until then one finder stands in `sys.meta_path`, which looks at that name alone and goes when it has seen it. The
    module itself is found and loaded as ever; its package is not imported for it.

    Args:
        name: the full name of a module, e.g. `"transformers.models.auto.modeling_auto"`.
        act: takes nothing; what it raises, the import raises.

    Example:
        >>> when_imported("json", lambda: print("it was there"))
        it was there
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder(MetaPathFinder):
    """Finds one module by the other finders, and has its loader act afterwards."""

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns the module's own spec with a loader that acts after loading; `None` for every other module."""
        if name != self.name:
            return None
        # First, or the search below would come here again.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return None
        spec.loader = _ActingLoader(spec.loader, self.act)
        return spec


class _ActingLoader(Loader):
    """Loads a module as its own loader does, gives it that loader back, and acts."""

    def __init__(self, loader: Any, act: Callable[[], Any]) -> None:
        self.loader, self.act = loader, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns what the module's own loader creates."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module's code, then acts; where that code fails, the next import is waited for."""
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
        except BaseException:
            sys.meta_path.insert(0, _Finder(module.__name__, self.act))
            raise
        self.act()
