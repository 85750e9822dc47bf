"""Teach transformers to read dwindle's packed checkpoints, without importing transformers.

`import dwindle` must stay light, yet a bare `import dwindle` must be enough for
`AutoModelForCausalLM.from_pretrained(folder)`. So `install()` puts one finder in front of `sys.meta_path` that waits
for `transformers.quantizers.auto`, the module that holds the table of quantization methods. When somebody imports it,
the finder steps aside, lets the ordinary loader run, and adds our method to the finished table
(`register_quantizer`, transformers' documented way, present in 4.57 and 5.x). Torch-free.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

_TABLE_MODULE = "transformers.quantizers.auto"


class _RegisteringLoader(Loader):
    """Runs the module's own loader, then registers our method in the table it made."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register()


class _TableFinder(MetaPathFinder):
    """Answers once, for the table module alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Register now if transformers is loaded, else as soon as it is. Calling it again changes nothing."""
    if _TABLE_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _register() -> None:
    from dwindle.transformers_quantizer import register

    register()
