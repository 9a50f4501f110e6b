"""Runs with networks of torchvision and timm: weights by name, their images and classes, resuming, evaluating."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdistill import config
from mdistill.data import DATASETS, DataInfo, InMemoryDataset
from mdistill.distillers import DISTILLERS, Distiller, Needs, Signals
from mdistill.engine.build import _check_single_image, build_distiller, build_students
from mdistill.errors import UserError
from mdistill.models import MODELS, feature_shapes, pretrained
from mdistill.models.imagenet.classes import WNIDS
from mdistill.models.layers import draws_in_training
from mdistill.models.preprocessing import Preprocessed, Preprocessing, preprocessed
from mdistill.models.pretrained import published_weights
from mdistill.models.teachers import locate, outputs_of
from mdistill.models.weights import fingerprint, load_weights

from .. import runs
from ..conftest import tiny_arrays
from ..replay import emulated

CLASSES = (WNIDS[7], WNIDS[3], WNIDS[900])

if "wnids" not in DATASETS.names():

    @DATASETS.register("wnids")
    def wnids(root: Path, download: bool, *, images: int) -> InMemoryDataset:
        """A few images of three classes, which are called as ImageNet's."""
        train, test = tiny_arrays(images, 3), tiny_arrays(12, 3, seed=1)
        statistics: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
        return InMemoryDataset(train, test, num_classes=3, class_names=CLASSES, **statistics)


def state_of(name: str, num_classes: int, path: Path | None = None) -> dict[str, Tensor]:
    """Weights, written to ``path``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = MODELS.build(name, num_classes).state_dict()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    return state


# --- runs ---


@pytest.mark.slow
def test_arguments_of_a_teacher_that_change_its_logits_are_in_its_fingerprint(tmp_path: Path) -> None:
    """Its weights are the same, and a cache or a measured top-1 of one must not be taken for the other's."""
    state_of("timm/test_resnet", 10, tmp_path / "big.pt")
    cfg = runs.write_config(tmp_path, teacher={"name": "timm/test_resnet", "checkpoint": "big.pt"})
    given = [(), ("teacher.global_pool=max",), ("teacher.global_pool=max", "teacher.output_stride=16")]
    prints = [runs.experiment(cfg, *each, cache=False).fingerprints["teacher"] for each in given]
    assert len({*prints}) == 3
    assert prints[0] == fingerprint(torch.load(tmp_path / "big.pt", weights_only=True))


@pytest.mark.slow
def test_a_last_batch_of_one_image_is_refused_where_batchnorm_cannot_take_it(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, student="timm/test_resnet")
    with pytest.raises(UserError, match="with 20 the last of an epoch's batches has a single one of the 101 images"):
        runs.experiment(cfg, "data.images=101", "data.batch_size=20", cache=False)
    info = DataInfo(num_classes=10, num_samples=23, image_size=8, num_views=1, batch_size=20)
    alone = config.load(runs.write_config(tmp_path, "vanilla", student="timm/test_resnet"), ["data.batch_size=20"])
    with pytest.raises(UserError, match="for one of 2 processes"):
        _check_single_image(alone, build_distiller(alone, info, None), info, 2)


def test_a_last_batch_of_one_image_is_refused_where_a_phase_of_the_method_cannot_take_it(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "hooks_phases")
    with pytest.raises(UserError, match="with 24 the last of an epoch's batches has a single one of the 97 images"):
        runs.experiment(cfg, "data.images=97", cache=False)


def test_an_epoch_ends_in_one_image_whose_pooled_map_a_method_normalises(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "reviewkd", data={"images": 25}, solver={"epochs": 1})
    ((line,),) = runs.train(cfg, tmp_path, cache=False)
    assert line["train/loss_reviewkd"] > 0


@pytest.mark.slow
def test_dropout_inside_of_attention_is_known() -> None:
    quiet, drawing = (
        MODELS.build("torchvision/vit_b_32", 2, image_size=32, attention_dropout=rate) for rate in (0.0, 0.1)
    )
    assert (draws_in_training(quiet), draws_in_training(drawing)) == (False, True)


@pytest.mark.slow
def test_a_run_with_dropout_resumes_and_is_captured_and_its_student_loads_into_timm(tmp_path: Path) -> None:
    import timm

    state_of("timm/test_resnet", 10, tmp_path / "big.pt")
    teacher = {"name": "timm/test_resnet", "checkpoint": "big.pt"}
    cfg = runs.write_config(tmp_path, student="timm/test_efficientnet", teacher=teacher, solver={"epochs": 2})
    cfg.write_text(cfg.read_text().replace("test_efficientnet", "test_efficientnet\n  drop_rate: 0.3"))
    runs.train(cfg, tmp_path / "whole")
    runs.train(cfg, tmp_path / "parts", stop_at=7)
    runs.train(cfg, tmp_path / "parts", mode="resume")
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    with emulated() as recorder:
        runs.train(cfg, tmp_path / "captured")
    assert recorder.replays
    runs.assert_same_runs(tmp_path / "whole", tmp_path / "captured")

    plain = timm.create_model("test_efficientnet", num_classes=10)
    written = torch.load(tmp_path / "whole" / "seed0" / "student.pt", weights_only=True)
    plain.load_state_dict(written["model"], strict=True)
    settings = config.load(cfg)
    assert settings.run_folder() == Path("tiny/kd/timm-test_resnet_timm-test_efficientnet/seed0")
    network = build_students(settings, runs.experiment(cfg).dataset.info(24))["student"]
    load_weights(network, tmp_path / "whole" / "seed0", name="timm/test_efficientnet")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.eval()(images), plain.eval()(images))


@pytest.mark.slow
def test_a_transformer_needs_the_size_of_the_images(tmp_path: Path) -> None:
    cfg = runs.write_config(tmp_path, "vanilla", student="timm/vit_tiny_patch16_224")
    small = ["student.depth=1", "student.embed_dim=12"]
    with pytest.raises(UserError, match=r"student.name: 'timm/vit_tiny_patch16_224' does not take .*images of 32x32"):
        runs.experiment(cfg, *small)
    size = runs.experiment(cfg, "student.name=tiny_net").dataset.image_size
    runs.train(cfg, tmp_path / "out", f"student.img_size={size}", *small, "solver.epochs=1")


def test_a_method_that_reads_features_is_refused_where_there_are_none(tmp_path: Path) -> None:
    if "reads_features" not in DISTILLERS.names():

        @DISTILLERS.register("reads_features")
        class ReadsFeatures(Distiller):
            needs = Needs(teacher="none", student="features")

            def distillation(self, signals: Signals) -> dict[str, Tensor]:
                raise NotImplementedError

    cfg = runs.write_config(tmp_path, "reads_features", student="torchvision/squeezenet1_1")
    with pytest.raises(UserError, match=r"'reads_features' reads features and 'torchvision/squeezenet1_1' gives none"):
        runs.experiment(cfg)


# --- weights to begin with ---


@pytest.mark.slow
def test_a_student_begins_with_weights_of_another_number_of_classes(tmp_path: Path) -> None:
    state = state_of("timm/test_efficientnet", 7, tmp_path / "start.pt")
    cfg = runs.write_config(tmp_path, "vanilla", student="timm/test_efficientnet")
    built = runs.experiment(cfg, "student.checkpoint=start.pt", seeds=(0, 1))
    plain = runs.experiment(cfg)
    for trial in built.trials:
        own = trial.distiller.student.state_dict()
        other = [key for key, value in own.items() if key not in state or not torch.equal(value, state[key])]
        assert other == ["classifier.weight", "classifier.bias"]
    fresh = [trial.distiller.student.state_dict()["classifier.weight"] for trial in built.trials]
    assert torch.equal(fresh[0], plain.trials[0].distiller.student.state_dict()["classifier.weight"])
    assert not torch.equal(fresh[0], fresh[1])
    assert built.fingerprints["student"] == hashlib.sha256((tmp_path / "start.pt").read_bytes()).hexdigest()
    assert "student" not in plain.fingerprints
    (note,) = [note for note in built.metadata["notes"] if note.startswith("student")]
    assert "was trained for 7 classes, the data set has 10: the classifier starts anew" in note


def test_weights_of_another_network_do_not_begin_one(tmp_path: Path) -> None:
    state_of("resnet8", 7, tmp_path / "start.pt")
    cfg = runs.write_config(tmp_path, "vanilla", student="resnet14")
    with pytest.raises(UserError, match="it holds resnet8 with 7 classes, not resnet14 with 10 classes"):
        runs.experiment(cfg, "student.checkpoint=start.pt")


@pytest.mark.slow
def test_missing_counters_of_batchnorm_are_zero_and_told(tmp_path: Path) -> None:
    state = {key: value for key, value in state_of("resnet8", 10).items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    network = MODELS.build("resnet8", 10)
    record = load_weights(network, tmp_path / "old.pt", name="resnet8")
    assert "has no num_batches_tracked" in str(record.note)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    del state["layer1.0.bn1.running_mean"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"2 missing, first layer1.0.bn1.running_mean"):
        load_weights(network, tmp_path / "short.pt", name="resnet8")


def test_safetensors_load_and_damage_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = state_of("resnet8", 10)
    save_file(state, tmp_path / "weights.safetensors")
    network = MODELS.build("resnet8", 10)
    record = load_weights(network, tmp_path / "weights.safetensors", name="resnet8")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    assert "is in the format safetensors, which has no checksums" in str(record.note)
    whole = (tmp_path / "weights.safetensors").read_bytes()
    for content in (whole[:-4], whole[:40], b"\xff" * 64, whole[:8] + b"[" + whole[9:]):
        (tmp_path / "weights.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"weights.safetensors is truncated or damaged"):
            load_weights(network, tmp_path / "weights.safetensors", name="resnet8")


# --- the teacher's images and classes ---


@torch.no_grad()
def test_images_are_those_that_the_other_normalisation_gives() -> None:
    """Against normalising and resizing the pixels themselves."""
    pixels = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    given = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 20)
    wanted = Preprocessing((0.5, 0.5, 0.4), (0.5, 0.1, 0.2), 32)

    def normalized(image: Tensor, to: Preprocessing) -> Tensor:
        return (image - torch.tensor(to.mean).view(3, 1, 1)) / torch.tensor(to.std).view(3, 1, 1)

    adapter = preprocessed(nn.Identity(), given, wanted)
    assert isinstance(adapter, Preprocessed)
    actual = adapter(normalized(pixels, given))
    resized = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(actual, normalized(resized, wanted), rtol=1e-5, atol=1e-5)
    same = nn.Identity()
    assert preprocessed(same, given, given) is same


def test_a_teacher_gets_its_own_preprocessing(tmp_path: Path) -> None:
    state_of("resnet8", 3, tmp_path / "big.pt")
    teacher = {"name": "resnet8", "checkpoint": "big.pt"}
    cfg = runs.write_config(tmp_path, data={"name": "wnids", "images": 20}, student="resnet8", teacher=teacher)
    plain = runs.experiment(cfg)
    own = runs.experiment(cfg, "teacher.preprocessing={mean: [0.5, 0.5, 0.5], image_size: 16}")
    network = own.trials[0].distiller.teacher
    assert isinstance(network, Preprocessed)
    assert network.wanted == Preprocessing((0.5, 0.5, 0.5), (0.2, 0.25, 0.3), 16)
    assert feature_shapes(network, 32).stages[0] == (16, 16, 16)
    assert network.classifier is network.network.classifier
    assert not isinstance(plain.trials[0].distiller.teacher, Preprocessed)
    assert own.fingerprints["teacher"] != plain.fingerprints["teacher"]
    assert own.cache is not None
    assert plain.cache is not None
    assert own.cache.path != plain.cache.path
    assert own.teacher is not None
    assert plain.teacher is not None
    assert own.teacher.folded == plain.teacher.folded > 0
    assert own.metadata["teacher"]["files"][0]["preprocessing"]["image_size"] == 16
    runs.train(cfg, tmp_path / "out", "teacher.preprocessing={image_size: 16}", "solver.epochs=1")
    with pytest.raises(UserError, match=r"preprocessing.image_sizes: unknown key .*did you mean 'image_size'"):
        config.load(cfg, ["teacher.preprocessing={image_sizes: 16}"])


def test_the_rows_of_a_classifier_that_are_the_classes_of_the_data(tmp_path: Path) -> None:
    state = state_of("resnet8", 1000, tmp_path / "big.pt")
    teacher = {"name": "resnet8", "checkpoint": "big.pt"}
    cfg = runs.write_config(tmp_path, data={"name": "wnids", "images": 20}, student="resnet8", teacher=teacher)
    with pytest.raises(UserError, match="was trained for 1000 classes, the data set has 3; teacher"):
        runs.experiment(cfg)
    network = runs.experiment(cfg, "teacher.classes=imagenet").trials[0].distiller.teacher
    assert network is not None
    full = MODELS.build("resnet8", 1000)
    full.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = full.eval()(images)[:, [7, 3, 900]]
        torch.testing.assert_close(network.eval()(images), expected)
    (tmp_path / "names.txt").write_text("\n".join(["other", *CLASSES]) + "\n")
    with pytest.raises(UserError, match=r"teacher.classes: it names 4 classes, the weights .* have 1,000"):
        runs.experiment(cfg, "teacher.classes=names.txt")


def test_classes_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of the data set's 2 classes are not among the 1,000 of .*first 'cat'"):
        outputs_of("imagenet", (WNIDS[0], "cat"), tmp_path, section="teacher")
    with pytest.raises(UserError, match=r"no file .*; did you mean 'imagenet'"):
        outputs_of("imagnet", CLASSES, tmp_path, section="teacher")
    with pytest.raises(UserError, match="does not say the names of its classes"):
        outputs_of("imagenet", (), tmp_path, section="teacher")
    (tmp_path / "twice").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="names 'a' twice"):
        outputs_of("twice", ("a",), tmp_path, section="teacher")


def test_class_names_are_those_of_imagenet() -> None:
    assert len(set(WNIDS)) == 1000
    assert list(WNIDS) == sorted(WNIDS)
    assert (WNIDS[0], WNIDS[-1]) == ("n01440764", "n15075141")


# --- published weights ---


class Server(http.server.ThreadingHTTPServer):
    """A server of files by path on this machine, as a publisher's, and as a hub's with its headers."""

    files: dict[str, bytes]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), _Handler) as server:
        server.files = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_torchvisions_weights_are_downloaded_checked_and_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import ResNet18_Weights

    content = b"weights of a network"
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = content
    address = f"http://127.0.0.1:{server.server_port}/{name}"
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", address)
    asked: dict[str, Any] = {"model": "torchvision/resnet18", "dataset": "folder"}
    path = locate("ResNet18_Weights.IMAGENET1K_V1", tmp_path, **asked)
    assert path == tmp_path / "torchvision" / name
    assert path.read_bytes() == content
    assert "downloading ResNet18_Weights.IMAGENET1K_V1" in capsys.readouterr().out
    server.files.clear()
    assert locate("IMAGENET1K_V1", tmp_path, **asked) == path  # again, from what was kept
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"is not ResNet18_Weights.IMAGENET1K_V1: its SHA-256 begins with"):
        locate("IMAGENET1K_V1", tmp_path, **asked)
    path.unlink()
    server.files[f"/{name}"] = b"damaged"
    with pytest.raises(UserError, match=r"could not be downloaded from .* \(invalid hash value.*; download it"):
        locate("IMAGENET1K_V1", tmp_path, **asked)
    server.files.clear()
    with pytest.raises(UserError, match=rf"could not be downloaded from {address} \(HTTP Error 404.* put it at {path}"):
        locate("IMAGENET1K_V1", tmp_path, **asked)
    assert not [*path.parent.iterdir()]


@pytest.mark.slow
def test_timms_weights_are_downloaded_from_its_hub_and_converted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save

    state = state_of("timm/test_resnet", 1000)
    server.files["/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"] = save(state)
    monkeypatch.setattr(pretrained, "_hub_address", lambda: f"http://127.0.0.1:{server.server_port}")
    teacher = {"name": "timm/test_resnet", "checkpoint": "pretrained", "classes": "imagenet"}
    cfg = runs.write_config(tmp_path, data={"name": "wnids", "images": 20}, student="tiny_net", teacher=teacher)
    network = runs.experiment(cfg).trials[0].distiller.teacher
    assert isinstance(network, Preprocessed)
    assert network.wanted == Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 160)
    rows = state["fc.weight"][[7, 3, 900]]
    assert torch.equal(network.network.state_dict()["fc.weight"], rows)
    folder = tmp_path / "timm" / "test_resnet.r160_in1k"
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    server.files.clear()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"timm/test_resnet.r160_in1k could not be downloaded from http://127.0.0.1"):
        runs.experiment(cfg)


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        (
            "torchvision/resnet50",
            "ResNet50_Weights.DEFAULT",
            "it is ResNet50_Weights.IMAGENET1K_V2; distillation papers",
        ),
        ("torchvision/resnet50", "IMAGENET1K_V3", "did you mean 'ResNet50_Weights.IMAGENET1K_V"),
        ("torchvision/resnet34", "ResNet50_Weights.IMAGENET1K_V1", "did you mean 'ResNet34_Weights.IMAGENET1K_V1'"),
        ("torchvision/resnet34", "pretrained", "torchvision has no weights 'pretrained' of resnet34"),
        pytest.param("timm/test_vit4", "pretrained", "timm has no weights of "),
    ],
)
def test_weights_that_there_are_not_are_told(model: str, checkpoint: str, message: str) -> None:
    if model == "timm/test_vit4":
        import timm

        model = next(f"timm/{name}" for name in timm.list_models("vit*") if not timm.models.is_model_pretrained(name))
    with pytest.raises(UserError, match=r"teacher.checkpoint") as error:
        published_weights(model, checkpoint, "teacher")
    assert message in str(error.value)


def test_the_papers_teacher_is_the_first_version() -> None:
    weights = published_weights("torchvision/resnet50", "ResNet50_Weights.IMAGENET1K_V1", "teacher")
    assert weights is not None
    assert weights.file == Path("torchvision/resnet50-0676ba61.pth")
    assert (weights.sha256, weights.num_classes, weights.image_size) == ("0676ba61", 1000, 224)
    assert weights.mean == (0.485, 0.456, 0.406)


def test_paths_and_networks_of_the_zoo_name_no_published_weights() -> None:
    assert published_weights("resnet20", "pretrained", "teacher") is None
    assert published_weights("torchvision/resnet18", "runs/folder/vanilla/seed0", "teacher") is None
    assert published_weights("torchvision/resnet18", "resnet18-f37072fd.pth", "teacher") is None
