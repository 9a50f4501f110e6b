"""What changes the weights: solvers, schedules and averages."""

from mdistill.optim import adamw as adamw  # these register themselves
from mdistill.optim import aligned_sgd as aligned_sgd
from mdistill.optim import dot as dot
from mdistill.optim.solvers import SOLVERS, Solver

__all__ = ["SOLVERS", "Solver"]
