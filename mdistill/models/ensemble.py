"""Several frozen networks as one teacher. Letters: B batch, C classes, M members."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistill.precision import widen

Average = Literal["probabilities", "logits"]


class Ensemble(nn.Module):
    """The average of several classifiers: logits of the averaged prediction.

    ``probabilities``: log of the mean of their probabilities, whose softmax is that mean. ``logits``: the mean of their
    logits, whose softmax is the geometric mean of their probabilities, normalised. Hinton et al., arXiv:1503.02531v1,
    Sec. 1 and 3, distil either.

    A method that softens by a temperature softens the averaged prediction; members are not softened one by one.
    """

    def __init__(self, members: Sequence[nn.Module], average: Average) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.average = average

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C) of the members' average, computed in float32 or wider.

        Args:
            image: (B, 3, H, W).
        """
        logits = [widen(member(image)) for member in self.members]
        if self.average == "logits":
            return torch.stack(logits).mean(dim=0)
        log_probs = torch.stack([F.log_softmax(each, dim=1) for each in logits])  # (M, B, C)
        return log_probs.logsumexp(dim=0) - math.log(len(logits))
