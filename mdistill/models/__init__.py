"""The model zoo: every network is looked up by name in ``MODELS`` and offers what ``Network`` promises."""

from mdistill.models import cifar as cifar  # registers the networks
from mdistill.models import external as external
from mdistill.models import imagenet as imagenet
from mdistill.models.base import MODELS, Features, FeatureShapes, Network, feature_shapes, trunk

__all__ = ["MODELS", "FeatureShapes", "Features", "Network", "feature_shapes", "trunk"]
