"""Libraries that only some commands need."""

import importlib
from types import ModuleType

from mdistill.errors import UserError


def extra(module: str, package: str, what: str, group: str = "plots") -> ModuleType:
    """``module``, which is slow to import or need not be installed; it is of the extra ``group``.

    Raises:
        UserError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {package}, which cannot be imported ({error}): pip install 'mdistill[{group}]'"
        ) from None
