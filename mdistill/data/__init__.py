"""Data sets. Each file registers what it offers; a user's own module does the same through ``imports``."""

from mdistill.data.batch import Batch, DataInfo
from mdistill.data.dataset import DATASETS, Dataset, InMemoryDataset, StreamedDataset
from mdistill.registry import import_submodules

import_submodules(__name__, list(__path__))

__all__ = ["DATASETS", "Batch", "DataInfo", "Dataset", "InMemoryDataset", "StreamedDataset"]
