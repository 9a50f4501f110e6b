"""What changes the weights: solvers, schedules and averages."""

from mdistill.optim import dot as dot  # registers itself
from mdistill.optim.solvers import SOLVERS, Solver

__all__ = ["SOLVERS", "Solver"]
