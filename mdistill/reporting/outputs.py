"""What the networks of finished runs compute on a split, for pictures of logits and features.

Letters: N images, C classes, D pooled width. Networks of runs are built once for each teacher and data set.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistill.errors import UserError, printable, suggestion

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mdistill.config import Config
    from mdistill.data import DataInfo, Dataset


KEPT = 8  # students whose outputs are kept


@dataclass(frozen=True)
class Outputs:
    """Of one network, on the CPU, in the order of the split."""

    logits: "Tensor"  # (N, C) float32
    target: "Tensor"  # (N,) int64
    pooled: "Tensor | None"  # (N, D) float32, the classifier's input, where it was asked for
    class_names: Sequence[str]  # () where the data set does not know them


def teacher_of_run(config: "Config", folder: Path, info: "DataInfo", checkpoint_root: Path) -> "nn.Module":
    """The teacher that the run in ``folder`` had, with its weights.

    Raises:
        UserError: it had none; the weights are not there, or others than the run had.
    """
    from mdistill.engine.build import trained_teacher

    if config.teacher is None:
        raise UserError(f"{folder}: a run without a teacher, so there is none to compare with")
    network, found = trained_teacher(config, info, checkpoint_root)
    for had in _teachers_recorded(folder):
        if had != found:
            raise UserError(
                f"{config.teacher.checkpoint} under {checkpoint_root} is not the teacher that the run in {folder} had:"
                f" its fingerprint was {printable(had)[:12]}, it is now {found[:12]}"
            )
    return network


def _teachers_recorded(folder: Path) -> list[str]:
    """Fingerprints of the teacher's weights that the run in ``folder`` had, by its sessions."""
    from mdistill.engine.run_folder import read_sessions

    told = [session.get("teacher") for session in read_sessions(folder)]
    found = [each.get("fingerprint") for each in told if isinstance(each, dict)]
    return sorted({each for each in found if isinstance(each, str)})


class Networks:
    """Students and teachers of runs; teachers' outputs and data sets are kept, as runs share them."""

    def __init__(
        self,
        *,
        device: "torch.device",
        data_root: Path,
        checkpoint_root: Path,
        configuration: "Callable[[Path], Config]",
        download: bool = False,
        split: str = "test",
    ) -> None:
        """
        Args:
            configuration: from the folder of a run.
        """
        self._device, self._split, self._config = device, split, configuration
        self._data_root, self._checkpoint_root, self._download = data_root, checkpoint_root, download
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

    def teacher(self, folder: Path) -> Outputs:
        """What the teacher of the run in ``folder`` computes.

        Raises:
            UserError: as ``teacher_of_run``.
        """
        config = self._config(folder)
        told = None if config.teacher is None else config.teacher.model_dump(mode="json")
        key = json.dumps([told, _data_key(config), _teachers_recorded(folder)])
        if told is None or key not in self._teachers:
            dataset = self._dataset(config)
            info = dataset.info(config.data.batch_size)
            network = teacher_of_run(config, folder, info, self._checkpoint_root)
            self._teachers[key] = self._outputs(network, "teacher", dataset, folder, pooled=False)
        return self._teachers[key]

    def extra_parameters(self, folder: Path) -> int:
        """Parameters that the run in ``folder`` trained beside the student's, by building it again."""
        from mdistill.engine.build import build_distiller, build_teacher, count_parameters

        config = self._config(folder)
        info = self._dataset(config).info(config.data.batch_size)
        return count_parameters(build_distiller(config, info, build_teacher(config, info)))["extra"]

    def _dataset(self, config: "Config") -> "Dataset":
        from mdistill.engine.build import build_dataset

        key = _data_key(config)
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

        from mdistill.engine.evaluate import evaluate
        from mdistill.engine.fidelity import Observer
        from mdistill.models.base import why_no_features
        from mdistill.models.memory_format import move, to_layout
        from mdistill.precision import set_numerics

        if pooled and (why := why_no_features(network)):
            raise UserError(f"{folder}: {name!r} gives no features before its classifier: {why}")
        set_numerics("fp32", deterministic=False)
        move(network, self._device, "fp32")
        observer = Observer(dataset.info(1).num_classes, self._device, teacher=None, keep=True)
        before: list[Tensor] = []

        def observe(image: "Tensor", logits: "Tensor", target: "Tensor") -> None:
            observer(image, logits, target)
            if pooled:
                features: Any = network.forward_features(to_layout(network, image))  # type: ignore[operator]
                before.append(features.pooled.float().cpu())

        evaluate(network, dataset, self._split, precision="fp32", observe=observe)
        kept = {key: torch.from_numpy(values) for key, values in observer.arrays().items()}
        if not bool(kept["logits"].isfinite().all()):
            raise UserError(f"{folder}: {name!r} has logits that are not finite")
        return Outputs(kept["logits"], kept["labels"], torch.cat(before) if pooled else None, dataset.class_names)


def _data_key(config: "Config") -> str:
    """The same where the data set and its splits are."""
    return json.dumps([config.data.model_dump(mode="json"), config.run.evaluate_test])


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
