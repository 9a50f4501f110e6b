"""What methods with a weakly and a strongly augmented view of the images share."""

from torch import Tensor

from mdistill.distillers.base import Distiller, Signals


class TwoViewDistiller(Distiller):
    """A method whose cross-entropy is the sum of both views'.

    Each network sees the two views one after the other, so that BatchNorm normalises each by itself.
    """

    smooths_labels = True

    def task(self, signals: Signals) -> dict[str, Tensor]:
        """``ce`` and ``ce_strong``, on the raw logits of each view."""
        assert signals.strong is not None
        strong = {f"{name}_strong": term for name, term in super().task(signals.strong).items()}
        return {**super().task(signals), **strong}
