"""What the networks of finished runs compute on a split, for pictures of logits and features.

Letters: N images, C classes, D pooled width. Networks of runs are built once for each teacher and data set.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.engine.run_folder import code_folders
from mdistill.errors import UserError, suggestion

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mdistill.config import Config
    from mdistill.data import Dataset


KEPT = 8  # students whose outputs are kept


@dataclass(frozen=True)
class Outputs:
    """Of one network, on the CPU, in the order of the split."""

    logits: "Tensor"  # (N, C) float32
    target: "Tensor"  # (N,) int64
    pooled: "Tensor | None"  # (N, D) float32, the classifier's input, where it was asked for
    class_names: Sequence[str]  # () where the data set does not know them


class Networks:
    """Students and teachers of runs; teachers' outputs and data sets are kept, as runs share them."""

    def __init__(
        self,
        *,
        device: "torch.device",
        data_root: Path,
        checkpoint_root: Path,
        download: bool = False,
        split: str = "test",
        imports: Sequence[str] = (),
        trust: bool = False,
    ) -> None:
        self._device, self._split = device, split
        self._data_root, self._checkpoint_root, self._download = data_root, checkpoint_root, download
        self._imports, self._trust = imports, trust
        self._datasets: dict[str, Dataset] = {}
        self._teachers: dict[str, Outputs] = {}
        self._students: dict[tuple[Path, bool], Outputs] = {}  # of late

    def student(self, folder: Path, *, pooled: bool = False) -> Outputs:
        """What the student of the run in ``folder`` computes.

        Raises:
            UserError: the run has no ``student.pt``, or its networks, data or code cannot be had.
        """
        from mdistill.engine.build import build_students
        from mdistill.models.weights import load_weights

        if (folder, pooled) in self._students:
            return self._students[folder, pooled]
        config = self._config(folder)
        dataset = self._dataset(config)
        network = next(iter(build_students(config, dataset.info(config.data.batch_size)).values()))
        load_weights(network, folder / "student.pt", name=config.student.name)
        outputs = self._outputs(network, config.student.name, dataset, folder, pooled)
        self._students = dict([*self._students.items()][1 - KEPT :]) | {(folder, pooled): outputs}
        return outputs

    def teacher(self, folder: Path, *, pooled: bool = False) -> Outputs:
        """What the teacher of the run in ``folder`` computes.

        Raises:
            UserError: the run has no teacher, or that cannot be had.
        """
        from mdistill.engine.build import build_teacher
        from mdistill.engine.starting_weights import load_teacher, networks_of, weight_files

        config = self._config(folder)
        if config.teacher is None:
            raise UserError(f"{folder}: a run without a teacher; this picture compares a student with its teacher")
        key = json.dumps([config.teacher.model_dump(mode="json"), config.data.model_dump(mode="json"), pooled])
        if key not in self._teachers:
            dataset = self._dataset(config)
            info = dataset.info(config.data.batch_size)
            files, _ = weight_files(config.model_copy(update={"student": _bare(config)}), self._checkpoint_root)
            network = build_teacher(config, info)
            assert network is not None
            load_teacher(config, networks_of(network), files, info.class_names, self._checkpoint_root)
            self._teachers[key] = self._outputs(network, config.teacher.name, dataset, folder, pooled)
        return self._teachers[key]

    def extra_parameters(self, folder: Path) -> int:
        """Parameters that the run in ``folder`` trained beside the student's, by building it again."""
        from mdistill.engine.build import build_distiller, build_teacher, count_parameters

        config = self._config(folder)
        info = self._dataset(config).info(config.data.batch_size)
        return count_parameters(build_distiller(config, info, build_teacher(config, info)))["extra"]

    def _config(self, folder: Path) -> "Config":
        from mdistill import config

        home = folder.resolve()
        beside = [place for place in code_folders(home) if self._trust or home not in (place, *place.parents)]
        folders = [Path.cwd(), *beside, *([home] if self._trust else [])]
        return config.load(folder / "config.yaml", imports=self._imports, folders=folders, trusted=self._trust)

    def _dataset(self, config: "Config") -> "Dataset":
        from mdistill.engine.build import build_dataset

        key = json.dumps(config.data.model_dump(mode="json"))
        if key not in self._datasets:
            built = build_dataset(config, data_root=self._data_root, download=self._download)
            self._datasets[key] = built.to(self._device)
        dataset = self._datasets[key]
        if self._split not in dataset.splits:
            near = suggestion(self._split, dataset.splits)
            raise UserError(f"--split: no split {self._split!r} here{near} (there is: {', '.join(dataset.splits)})")
        return dataset

    def _outputs(self, network: "nn.Module", name: str, dataset: "Dataset", folder: Path, pooled: bool) -> Outputs:
        import torch

        from mdistill.engine.evaluate import BATCH
        from mdistill.models.memory_format import move, to_layout
        from mdistill.precision import computing, set_numerics

        why = getattr(network, "no_features", None) if hasattr(network, "forward_features") else "no forward_features"
        if pooled and why:
            raise UserError(f"{folder}: {name!r} gives no features before its classifier: {why}")
        set_numerics("fp32", deterministic=False)
        move(network.eval(), self._device, "fp32")
        parts: list[tuple[Any, ...]] = []
        with torch.no_grad():
            for image, target in dataset.eval_batches(self._split, BATCH[self._device.type]):
                with computing("fp32", self._device):
                    if pooled:
                        features: Any = network.forward_features(to_layout(network, image))  # type: ignore[operator]
                        logits, before = features.logits, features.pooled
                    else:
                        logits, before = network(to_layout(network, image)), target
                parts.append((logits.float().cpu(), target.cpu(), before.float().cpu()))
        logits, target, before = (torch.cat(column) for column in zip(*parts, strict=True))
        if not bool(logits.isfinite().all()):
            raise UserError(f"{folder}: {name!r} has logits that are not finite")
        return Outputs(logits, target, before if pooled else None, dataset.class_names)


def _bare(config: "Config") -> Any:
    """The student without the weights that it began with, which a finished one does not need."""
    return config.student.model_copy(update={"checkpoint": None})


def embed(features: Sequence["Tensor"], *, seed: int, perplexity: float = 30.0) -> list[Any]:
    """t-SNE of each network's features on its own: van der Maaten and Hinton, JMLR 9 (2008) 2579.

    Args:
        features: (N, D) of each.
        seed: of the optimisation, which starts from the two main components.
        perplexity: how many neighbours count, about; less than N.

    Returns:
        arrays (N, 2).

    Raises:
        UserError: scikit-learn is not installed, or there are too few images.
    """
    from mdistill.reporting.extras import extra

    manifold = extra("sklearn.manifold", "scikit-learn", "t-SNE")
    images = min(len(each) for each in features)
    if images <= perplexity:
        raise UserError(f"t-SNE with perplexity {perplexity:g} needs more images than that, found {images}")
    fit = manifold.TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return [fit.fit_transform(each.double().numpy()) for each in features]
