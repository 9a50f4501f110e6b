"""DOT: a solver that gathers momentum of task and distillation gradients apart."""

from typing import Any

import torch
from torch import Tensor

from mdistill.distillers.base import StepOutput
from mdistill.errors import UserError
from mdistill.optim.solvers import (
    SOLVERS,
    Solver,
    clip_factor,
    fused_sgd,
    load_optimizer,
    optimizer_misfit,
    set_group_rates,
)
from mdistill.optim.two_gradients import Gradients, require_both_terms, set_gradients, two_gradients
from mdistill.registry import NonNegative, Positive


@SOLVERS.register("dot")
class DOT(Solver):
    """DOT: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023, arXiv:2307.08436.

    The gradients of task and distillation terms gather momentum apart, those of the latter more of it:
    v_task <- (mu - Delta) v_task + g_task, v_distill <- (mu + Delta) v_distill + g_distill,
    theta <- theta - gamma (v_task + v_distill).

    Symbols: mu = ``momentum``, Delta = ``delta``, gamma = the learning rate, theta = the weights, g = gradients, v = 0
    at first. With Delta = 0 this is ``SGD``, at the price of a second backward pass.

    Differs from these equations, as the released code does: weight decay joins g_task, and a weight that only one of
    the two losses reaches (the same one in every step) has one v, with momentum mu and weight decay.

    Differs from the released code: there a weight that only the distillation reaches is not decayed in its first step.

    Args:
        clip_grad_norm: the longest g_task + g_distill, of all weights together and without weight decay; where it is
            longer, both are scaled by the same factor, so that Delta = 0 stays ``SGD``. Ours: no paper clips here.
    """

    backward_passes = 2

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        momentum: NonNegative,
        delta: NonNegative,
        weight_decay: NonNegative,
        clip_grad_norm: Positive | None = None,
    ) -> None:
        if delta > momentum:
            raise UserError(f"solver.delta: should be at most solver.momentum, {momentum}, found {delta}")
        if momentum + delta >= 1:
            raise UserError(f"solver.delta: should with solver.momentum, {momentum}, sum to below 1, found {delta}")
        self.optimizers = {  # each steps the weights that it is given gradients of, one after the other
            "task": fused_sgd(param_groups, momentum=momentum - delta, weight_decay=weight_decay),
            "distillation": fused_sgd(param_groups, momentum=momentum + delta),
            "alone": fused_sgd(param_groups, momentum=momentum, weight_decay=weight_decay),
        }
        self._parameters = [parameter for group in param_groups for parameter in group["params"]]
        self._longest = clip_grad_norm

    def check(self, output: StepOutput) -> None:
        """Both kinds of terms are needed."""
        require_both_terms("dot", output)

    def step(self, output: StepOutput) -> None:
        self.check(output)
        pairs = list(zip(*two_gradients(output, self._parameters), strict=True))
        if self._longest is not None:
            _clip(pairs, self._longest)
        self._update("task", [t if d is not None else None for t, d in pairs])  # first: it reads the weights too
        self._update("distillation", [d if t is not None else None for t, d in pairs])
        self._update("alone", [d if t is None else t if d is None else None for t, d in pairs])

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers.values():
            set_group_rates(optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state[name])

    def misfit(self, state: dict[str, Any], *, stepped: bool) -> str | None:
        if state.keys() != self.optimizers.keys():
            return f"solver should hold {', '.join(self.optimizers)}"
        found = (optimizer_misfit(f"solver.{name}", each, state[name]) for name, each in self.optimizers.items())
        problem = next((problem for problem in found if problem), None)
        momentum = any(group["momentum"] for each in self.optimizers.values() for group in each.param_groups)
        if not problem and stepped and momentum and not any(each["state"] for each in state.values()):
            return "solver holds no momentum"
        return problem

    def _update(self, name: str, gradients: Gradients) -> None:
        set_gradients(self._parameters, gradients)
        self.optimizers[name].step()


def _clip(pairs: list[tuple[Tensor | None, Tensor | None]], longest: float) -> None:
    """Scale both gradients of each weight, in place, by the ``clip_factor`` of their sums."""
    reached = [[each for each in pair if each is not None] for pair in pairs]
    factor = clip_factor([torch.stack(pair).sum(dim=0) for pair in reached if pair], longest)
    torch._foreach_mul_([each for pair in reached for each in pair], factor)
