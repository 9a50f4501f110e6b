"""AdamW."""

from typing import Annotated, Any

import torch
from pydantic import Field

from mdistill.optim.solvers import SOLVERS, OptimizerSolver, groups_with_rates, optimizer_misfit
from mdistill.registry import NonNegative, Positive

Decay = Annotated[float, Field(ge=0, lt=1)]


@SOLVERS.register("adamw")
class AdamW(OptimizerSolver):
    """AdamW on the sum of all terms: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.

    Algorithm 2, in which weight decay is multiplied by the learning rate, as torch has it. A weight counts its own
    steps, from its first gradient. One fused update for all weights. On CUDA each group's rate is a tensor there, which
    a captured step reads anew, as are the counts of steps.

    Args:
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the latter.
        clip_grad_norm: the longest gradient, of all weights together; see ``clip_factor``.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative,
        clip_grad_norm: Positive | None = None,
    ) -> None:
        optimizer = torch.optim.AdamW(
            groups_with_rates(param_groups),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
            capturable=True,
        )
        super().__init__(optimizer, clip_grad_norm)

    def misfit(self, state: dict[str, Any], *, stepped: bool) -> str | None:
        problem = optimizer_misfit("solver", self.optimizer, state)
        if not problem and stepped and not state["state"]:
            return "solver.state holds no averages"
        return problem
