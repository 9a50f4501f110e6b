"""mdistill: logit distillation of image classifiers.

The public names, each imported when it is first asked for:

- ``load_config(path, overrides)``: a configuration from YAML, checked and complete
- ``DISTILLERS``, ``MODELS``, ``DATASETS``: methods, networks and data sets by name; ``.register(name)`` adds one
- ``Distiller``, ``Needs``: what a method is made of
- ``losses``: every loss as a pure function, such as ``losses.dkd_loss``
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdistill import losses
    from mdistill.config import load as load_config
    from mdistill.data import DATASETS
    from mdistill.distillers import DISTILLERS, Distiller, Needs
    from mdistill.models import MODELS

__version__ = "0.2.0"

__all__ = ["DATASETS", "DISTILLERS", "MODELS", "Distiller", "Needs", "__version__", "load_config", "losses"]

_PLACES = {
    "DATASETS": "mdistill.data:DATASETS",
    "DISTILLERS": "mdistill.distillers:DISTILLERS",
    "Distiller": "mdistill.distillers:Distiller",
    "MODELS": "mdistill.models:MODELS",
    "Needs": "mdistill.distillers:Needs",
    "load_config": "mdistill.config:load",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("mdistill.losses")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
