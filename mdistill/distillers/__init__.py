"""Distillation methods, one file a paper: every module of this package is imported here and registers itself."""

from mdistill.distillers.base import DISTILLERS, Distiller, Needs, Signals, StepOutput
from mdistill.registry import import_submodules

__all__ = ["DISTILLERS", "Distiller", "Needs", "Signals", "StepOutput"]

import_submodules(__name__, list(__path__))
