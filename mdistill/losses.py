"""Every loss of every method as a pure function of tensors and numbers, under the name that it has in its module.

Where two methods use one name, as ``instance_loss``, the method's own comes before it: ``mcld_instance_loss``.
"""

import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def __getattr__(name: str) -> "Callable[..., Tensor]":
    if name.startswith("__"):  # asked by the import system; imports nothing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mdistill.errors import suggestion

    losses = _losses()
    if name not in losses:
        raise AttributeError(f"module {__name__!r} has no loss {name!r}{suggestion(name, losses)}")
    return losses[name]


def __dir__() -> list[str]:
    return sorted(_losses())


@cache
def _losses() -> "dict[str, Callable[..., Tensor]]":
    """Name -> function, for every public function of a method's module whose name ends with ``_loss``."""
    from mdistill import distillers

    functions = [
        (module.name, name, function)
        for module in pkgutil.iter_modules(distillers.__path__)
        for name, function in vars(import_module(f"{distillers.__name__}.{module.name}")).items()
        if name.endswith("_loss") and name[0] != "_" and inspect.isfunction(function)
        if function.__module__ == f"{distillers.__name__}.{module.name}"
    ]
    uses = Counter(name for _, name, _ in functions)
    return {name if uses[name] == 1 else f"{module}_{name}": function for module, name, function in functions}
