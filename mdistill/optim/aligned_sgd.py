"""AlignedSGD: SGD on a distillation gradient that gives up what runs against the task's."""

import torch

from mdistill.distillers.base import StepOutput
from mdistill.optim.solvers import SGD, SOLVERS, clip_gradients
from mdistill.optim.two_gradients import Gradients, require_both_terms, set_gradients, two_gradients


def aligned(task: Gradients, distillation: Gradients) -> Gradients:
    """g_task + g_distill - min(0, <g_distill, g_task>) / <g_task, g_task> g_task, over all weights as one vector.

    Where a loss does not reach a weight its gradient there counts as 0. The task's gradients are written over.

    Args:
        task: g_task, of each weight.
        distillation: g_distill, of each weight.

    Returns:
        the same for the sum; None where neither reaches.
    """
    pairs = [(t, d) for t, d in zip(task, distillation, strict=True) if t is not None and d is not None]
    if pairs:
        of_task, of_distillation = map(list, zip(*pairs, strict=True))
        inner = torch.stack([product.sum() for product in torch._foreach_mul(of_task, of_distillation)]).sum()
        reached = [t for t in task if t is not None]
        square = torch.nn.utils.get_total_norm(reached).square().clamp(min=torch.finfo(inner.dtype).tiny)
        torch._foreach_mul_(reached, 1 - inner.clamp(max=0) / square)
        torch._foreach_add_(of_task, of_distillation)
    return [d if t is None else t for t, d in zip(task, distillation, strict=True)]


@SOLVERS.register("aligned_sgd")
class AlignedSGD(SGD):
    """``SGD`` on ``aligned`` gradients, at the price of a second backward pass.

    Gradient surgery (Yu et al., arXiv:2001.06782) of the distillation's gradient alone, which Yang et al.,
    arXiv:2411.08937v2, train two heads with: what runs against the gradient of the task terms is taken from it.

    Args:
        clip_grad_norm: the longest aligned gradient, of all weights together and without weight decay.
    """

    backward_passes = 2

    def check(self, output: StepOutput) -> None:
        """Both kinds of terms are needed."""
        require_both_terms("aligned_sgd", output)

    def step(self, output: StepOutput) -> None:
        self.check(output)
        set_gradients(self._parameters, aligned(*two_gradients(output, self._parameters)))
        clip_gradients(self._parameters, self._longest)
        self.optimizer.step()
