"""The model zoo: every network is looked up by name in ``MODELS`` and offers what ``Network`` promises."""

from mdistill.models import cifar as cifar  # registers the networks
from mdistill.models.base import MODELS, Features, Network

__all__ = ["MODELS", "Features", "Network"]
