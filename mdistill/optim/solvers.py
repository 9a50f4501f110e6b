"""Solvers own the backward pass: they turn a step's named losses into a change of the weights."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mdistill.distillers.base import StepOutput
from mdistill.errors import UserError
from mdistill.registry import NonNegative, Registry

SOLVERS: Registry["Solver"] = Registry("solver")


class Solver(ABC):
    """What ``train_step`` calls after the forward pass.

    Builders take the distiller's ``param_groups()``; their keyword-only parameters come from the ``solver:`` section.
    """

    backward_passes = 1  # a step, over one forward pass

    def check(self, output: StepOutput) -> None:  # noqa: B027
        """Refuse a method whose steps this solver cannot take, told from the terms of one; by default takes all.

        Reads which terms there are, not their values, so any output of the method will do, before any training.

        Raises:
            UserError: says what is missing and what to change.
        """

    @abstractmethod
    def step(self, output: StepOutput) -> None:
        """Backward and update. No host sync."""

    @abstractmethod
    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming steps (each group's ``lr_scale`` multiplies it)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""


@SOLVERS.register("sgd")
class SGD(Solver):
    """Stochastic gradient descent with momentum on the sum of all terms; weight decay joins the gradient.

    One fused update for all weights. On CUDA each group's rate is a tensor there, which a captured step reads anew.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        momentum: NonNegative,
        nesterov: bool = False,
        weight_decay: NonNegative,
    ) -> None:
        if nesterov and momentum == 0:
            raise UserError("solver.nesterov: true needs solver.momentum above 0, found 0")
        self.optimizer = _fused_sgd(param_groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    def step(self, output: StepOutput) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        output.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        _set_lr(self.optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load(self.optimizer, state)


@SOLVERS.register("dot")
class DOT(Solver):
    """DOT: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023, arXiv:2307.08436.

    The gradients of task and distillation terms gather momentum apart, those of the latter more of it:
    v_task <- (mu - Delta) v_task + g_task, v_distill <- (mu + Delta) v_distill + g_distill,
    theta <- theta - gamma (v_task + v_distill).

    Symbols: mu = ``momentum``, Delta = ``delta``, gamma = the learning rate, theta = the weights, g = gradients, v = 0
    at first. With Delta = 0 this is ``SGD``, at the price of a second backward pass.

    Differs from these equations, as the published code does: weight decay joins g_task, and a weight that only one of
    the two losses reaches (the same one in every step) has one v, with momentum mu and weight decay. That code leaves
    weight decay out of the first step of a weight that only the distillation reaches; here it is in.
    """

    backward_passes = 2

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        momentum: NonNegative,
        delta: NonNegative,
        weight_decay: NonNegative,
    ) -> None:
        if delta > momentum:
            raise UserError(f"solver.delta: should be at most solver.momentum, {momentum}, found {delta}")
        if momentum + delta >= 1:
            raise UserError(f"solver.delta: should with solver.momentum, {momentum}, sum to below 1, found {delta}")
        self.optimizers = {  # each steps the weights that it is given gradients of, one after the other
            "task": _fused_sgd(param_groups, momentum=momentum - delta, weight_decay=weight_decay),
            "distillation": _fused_sgd(param_groups, momentum=momentum + delta),
            "alone": _fused_sgd(param_groups, momentum=momentum, weight_decay=weight_decay),
        }
        self._parameters = [parameter for group in param_groups for parameter in group["params"]]

    def check(self, output: StepOutput) -> None:
        """Both kinds of terms are needed."""
        if not output.task:
            missing, remedy = "task", "set distiller.ce_weight above 0"
        elif not output.distillation:
            missing, remedy = "distillation", "choose a method with one"
        else:
            return
        raise UserError(
            f"solver.name: dot needs a task and a distillation term, this method has no {missing} term;"
            f" {remedy} or choose another solver.name"
        )

    def step(self, output: StepOutput) -> None:
        self.check(output)
        task = self._gradients(output.task, retain_graph=True)
        distillation = self._gradients(output.distillation, retain_graph=False)
        pairs = list(zip(task, distillation, strict=True))
        self._update("task", [t if d is not None else None for t, d in pairs])  # first: it reads the weights too
        self._update("distillation", [d if t is not None else None for t, d in pairs])
        self._update("alone", [d if t is None else t if d is None else None for t, d in pairs])

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers.values():
            _set_lr(optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            _load(optimizer, state[name])

    def _gradients(self, terms: dict[str, Tensor], *, retain_graph: bool) -> list[Tensor | None]:
        """Of the sum of ``terms``, for each weight; None where it does not reach.

        By ``backward``, which lays them out as the fused update wants them; ``torch.autograd.grad`` does not.
        """
        for parameter in self._parameters:
            parameter.grad = None
        torch.stack(list(terms.values())).sum().backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in self._parameters]

    def _update(self, name: str, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizers[name].step()


def _fused_sgd(param_groups: list[dict[str, Any]], **settings: Any) -> torch.optim.SGD:
    groups = [{"lr_scale": 1.0, **group, "lr": _rate(group["params"][0].device)} for group in param_groups]
    return torch.optim.SGD(groups, fused=True, **settings)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def _load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:  # where the weights are, whatever the device of the saved run
        group["lr"] = _rate(group["params"][0].device, float(group["lr"]))


def _rate(device: torch.device, value: float = 0.0) -> Tensor | float:
    return torch.tensor(value, device=device) if device.type == "cuda" else value
