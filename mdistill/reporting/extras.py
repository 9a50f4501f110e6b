"""Libraries that only some pictures need."""

import importlib
from types import ModuleType

from mdistill.errors import UserError


def extra(module: str, package: str, what: str) -> ModuleType:
    """``module``, which is slow to import or need not be installed.

    Raises:
        UserError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {package}, which cannot be imported ({error}): pip install 'mdistill[plots]'"
        ) from None
