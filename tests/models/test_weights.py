"""Every published form of a checkpoint loads; everything else is refused in one line that says why."""

import argparse
import hashlib
import io
import os
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdistill.errors import RunFailed, UserError
from mdistill.models import MODELS, torch_files
from mdistill.models.torch_files import file_record
from mdistill.models.weights import fingerprint, load_weights, read_checkpoint, save_weights


def network(name: str = "resnet8", num_classes: int = 10, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS.build(name, num_classes)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(network(seed=1).state_dict())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def optimizer_state() -> dict[str, Any]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path, **arguments)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- published forms ---

OPTIONS = argparse.Namespace(model="resnet8", lr=0.05, lr_decay_epochs=[150, 180, 210], cosine=False, path=None)
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "epoch and tensor accuracy": {"epoch": 240, "accuracy": torch.tensor(72.5)},
    "best accuracy tensor": {"epoch": 240, "best_acc": torch.tensor(72.5)},
    "NumPy scalars": {
        "best_acc": np.float64(72.5),
        "accuracy": np.float32(72.5),
        "epoch": np.int64(240),
        "half": np.float16(1),
        "flag": np.bool_(True),
    },
    "options": {"opt": OPTIONS},
    "nested": {"opt": argparse.Namespace(best=np.float64(1.0), inner=argparse.Namespace(a=1)), "l": [np.int32(1)]},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", BESIDE)
def test_weights_under_model_load(tmp_path: Path, state: dict[str, Tensor], beside: str, legacy: bool) -> None:
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"model": state, **BESIDE[beside]}, path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_checkpoint(path), state)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_state_dict_loads(tmp_path: Path, state: dict[str, Tensor], prefix: str, legacy: bool) -> None:
    path = tmp_path / "student_best"
    torch.save(OrderedDict(prefixed(prefix, state)), path, _use_new_zipfile_serialization=not legacy)
    assert_same(read_checkpoint(path), state)
    assert_same(read_checkpoint(path, role="teacher"), state)


def test_optimizer_state_and_options_beside_are_ignored(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "resnet8_last.pth"
    torch.save({"opt": OPTIONS, "model": state, "optimizer": optimizer_state()}, path)
    assert_same(read_checkpoint(path), state)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_wanted_network_of_a_distiller_loads(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    teacher = dict(network("vgg8").state_dict())
    whole = {
        **prefixed(f"{prefix}student.", state),
        **prefixed(f"{prefix}teacher.", teacher),
        f"{prefix}crd_loss.embed_s.linear.weight": torch.zeros(2, 2),
        f"{prefix}queue": torch.full((3,), float("nan")),  # another part of the method, which nobody asked for
    }
    path = tmp_path / "latest"
    torch.save({"epoch": 1, "model": whole, "optimizer": optimizer_state(), "best_acc": torch.tensor(1.0)}, path)
    assert_same(read_checkpoint(path), state)
    assert_same(read_checkpoint(path, role="student"), state)
    assert_same(read_checkpoint(path, role="teacher"), teacher)


@pytest.mark.parametrize("prefix", ["module.student.", "student."])
def test_a_network_trained_without_teacher_serves_as_teacher(
    tmp_path: Path, state: dict[str, Tensor], prefix: str
) -> None:
    path = tmp_path / "best"
    torch.save({"model": prefixed(prefix, state)}, path)
    assert_same(read_checkpoint(path, role="teacher"), state)


def test_a_teacher_alone_is_no_student(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "best"
    torch.save({"model": prefixed("module.teacher.", state)}, path)
    assert_same(read_checkpoint(path, role="teacher"), state)
    assert "holds a teacher but no student" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_saved_on_a_gpu_load_on_the_cpu(
    tmp_path: Path, state: dict[str, Tensor], legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file names the device of each tensor's values; here a GPU, whatever this machine has."""
    path = tmp_path / "ckpt_epoch_240.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save({"model": state, "best_acc": torch.tensor(72.5)}, path, _use_new_zipfile_serialization=not legacy)
    assert path.read_bytes().count(b"cuda:0") >= 1
    loaded = read_checkpoint(path)
    assert_same(loaded, state)
    assert {value.device.type for value in loaded.values()} == {"cpu"}


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scalars_as_numpy_1_and_2_name_them_are_ignored(tmp_path: Path, state: dict[str, Tensor], module: str) -> None:
    """The same bytes but for the module's name, which both versions write with its length as a text line."""
    path = tmp_path / "best"
    torch.save({"model": state, "best_acc": np.float64(72.5)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    ours = re.search(rb"numpy\.(_core|core)\.multiarray", data)
    assert ours
    path.write_bytes(data.replace(b"c" + ours.group() + b"\nscalar", b"c" + module.encode() + b"\nscalar"))
    assert_same(read_checkpoint(path), state)


def test_parameters_and_saved_views_become_plain_tensors(tmp_path: Path) -> None:
    path = tmp_path / "p.pth"
    torch.save({"fc.weight": nn.Parameter(torch.ones(2, 3)), "fc.bias": torch.arange(6.0)[::3]}, path)
    state = read_checkpoint(path)
    assert all(type(value) is Tensor and not value.requires_grad for value in state.values())
    assert state["fc.bias"].tolist() == [0.0, 3.0]


def test_run_folder_means_its_student(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_weights(tmp_path / "seed0" / "student.pt", state)
    assert_same(read_checkpoint(tmp_path / "seed0"), state)
    model = network()
    load_weights(model, tmp_path / "seed0", name="resnet8")
    assert_same(dict(model.state_dict()), state)


def test_nothing_stays_allowed_after_loading(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "best"
    torch.save({"model": state, "best_acc": np.float64(72.5)}, path)
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before


# --- what is refused ---


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("place", ["whole", "beside", "model"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 4"])
def test_code_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor], form: str, place: str) -> None:
    victim = tmp_path / "victim"
    hostile = Hostile(victim)
    content: Any = {
        "whole": hostile,
        "beside": {"model": state, "opt": hostile},
        "model": {"model": {**state, "x": hostile}},
    }[place]
    path = tmp_path / "evil.pth"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(hostile if place == "whole" else {"opt": hostile}, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert "refused and nothing of it was run" in message
    assert f"'{os.mkdir.__module__}.mkdir'" in message
    assert not victim.exists()
    pickle.loads(pickle.dumps(hostile))  # the trap itself works
    assert victim.exists()


def test_a_pickled_network_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(network(), path)
    assert "it names 'mdistill.models.cifar.resnet.ResNet', which is code" in refusal(path)


def test_numpy_objects_beyond_scalars_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": state, "history": np.zeros(3)}, path)
    assert "_reconstruct" in refusal(path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "resnet32x4_vanilla").mkdir()
    (tmp_path / "resnet32x4_vanilla" / "ckpt_epoch_240.pth").touch()
    message = refusal(tmp_path / "resnet32x4_vanilla" / "ckpt_epoch_204.pth")
    assert message.endswith("does not exist; did you mean 'ckpt_epoch_240.pth'?")
    message = refusal(tmp_path / "resnet32x4_vanila" / "ckpt_epoch_240.pth")
    assert f"there is no {tmp_path / 'resnet32x4_vanila'}" in message
    assert message.endswith("did you mean 'resnet32x4_vanilla'?")


def test_folder_without_student_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert "is a folder without student.pt (it holds: config.yaml)" in refusal(tmp_path)


def test_unreadable_path_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in refusal(tmp_path / ("a" * 5000))


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, state: dict[str, Tensor], fraction: float, legacy: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    assert "is truncated" in refusal(path)


def test_damaged_file_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": state}, path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(bytes(data))
    assert re.search(r"is damaged: the checksum of \S+ in it does not fit", refusal(path))


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"# python tools/train.py\nteacher: {name: resnet32x4}\n", "# python"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "version"),
        (bytes(4096), "x00"),
        (pickle.dumps({"epoch": 1}), "x80"),
    ],
    ids=["yaml", "png", "lfs", "zeros", "plain pickle"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, start: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    message = refusal(path)
    assert "is not a torch checkpoint: it starts with" in message
    assert start in message


def test_archives_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar_teachers.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("resnet32x4_vanilla/ckpt_epoch_240.pth"), io.BytesIO())
    assert "is a tar archive: unpack it" in refusal(archive)
    arrays = tmp_path / "a.npz"
    np.savez(arrays, logits=np.zeros(3))
    assert (
        "is a zip archive, not a torch checkpoint: unpack it and name a file in it (it holds: logits.npy)"
        in refusal(arrays)
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (torch.zeros(3, 4), "holds one tensor of shape (3, 4), not a state dict"),
        ([1, 2], "holds a list, not a state dict"),
        (
            {"epoch": 3, "best_acc": 0.5},
            "holds no weights: 2 of the 2 entries in it are not tensors (keys: epoch, best_acc",
        ),
        ({"model": "resnet8"}, "holds a str under 'model', not a state dict"),
        ({"model": {"fc.weight": torch.ones(1), "note": "x"}}, "1 of the 2 entries under 'model' are not tensors"),
        ({}, "holds no weights"),
    ],
    ids=["tensor", "list", "numbers", "name", "mixed", "nothing"],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: Any, expected: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path)
    assert expected in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_in_reading_and_writing(
    tmp_path: Path, state: dict[str, Tensor], value: float
) -> None:
    state["layer2.0.bn1.running_var"][3] = value
    path = tmp_path / "a.pth"
    torch.save({"model": state}, path)
    assert "layer2.0.bn1.running_var holds NaN or infinite values" in refusal(path)
    with pytest.raises(RunFailed, match=r"refused to write .*student\.pt: layer2.0.bn1.running_var holds NaN"):
        save_weights(tmp_path / "student.pt", state)
    assert not (tmp_path / "student.pt").exists()


# --- another network's weights ---


def mismatch(path: Path, model: nn.Module, name: str) -> str:
    before = fingerprint(model.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(model, path, name=name)
    assert fingerprint(model.state_dict()) == before, "a refused checkpoint changed the model"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_with_a_prefix_load_into_a_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": prefixed("module.", state)}, path)
    model = network(seed=2)
    load_weights(model, path, name="resnet8", role="teacher")
    assert_same(dict(model.state_dict()), state)


@pytest.mark.slow
def test_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"model": network("resnet32x4", 100).state_dict()}, path)
    message = mismatch(path, network("resnet8x4", 100), "resnet8x4")
    assert message == (
        f"checkpoint {path}: it holds resnet32x4 with 100 classes, not resnet8x4 with 100 classes;"
        " keys: 144 unexpected, first layer1.1.conv1.weight"
    )


@pytest.mark.slow
def test_another_width_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(network("wrn_16_1", 100).state_dict(), path)
    message = mismatch(path, network("wrn_16_2", 10), "wrn_16_2")
    assert "it holds wrn_16_1 with 100 classes, not wrn_16_2 with 10 classes; keys: 1 missing" in message
    assert "first block1.layer.0.conv1.weight: (16, 16, 3, 3), not (32, 16, 3, 3)" in message


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "vgg8", "shufflenet_v2", "wrn_16_1"])
@pytest.mark.slow
def test_other_number_of_classes_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(network(name, 10).state_dict(), path)
    message = mismatch(path, network(name, 100), name)
    assert message == f"checkpoint {path}: {name} was trained for 10 classes, the data set has 100"


@pytest.mark.slow
def test_weights_of_no_known_model_are_refused_with_the_differences(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["conv1.weight"]
    state["extra"] = torch.zeros(1)
    state["fc.bias"] = torch.zeros(9)
    path = tmp_path / "a.pth"
    torch.save(state, path)
    message = mismatch(path, network(), "resnet8")
    assert message == (
        f"checkpoint {path}: it does not fit resnet8, nor any other known model; keys: 1 missing,"
        " first conv1.weight; 1 unexpected, first extra; 1 of another shape, first fc.bias: (9,), not (10,)"
    )


def test_naming_a_model_draws_no_random_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(network("resnet14").state_dict(), path)
    before = torch.random.get_rng_state()
    with pytest.raises(UserError, match="it holds resnet14 with 10 classes"):
        load_weights(network(), path, name="resnet8")
    assert torch.equal(torch.random.get_rng_state(), before)


# --- writing ---


def test_saved_weights_read_back(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "run" / "student.pt"
    save_weights(path, state)
    assert_same(read_checkpoint(path), state)
    assert list(torch.load(path, weights_only=True)) == ["model"]
    assert [entry.name for entry in path.parent.iterdir()] == ["student.pt"]


def test_saved_bytes_depend_on_the_weights_alone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    last = {
        key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for key, value in state.items()
    }
    save_weights(tmp_path / "a" / "one.pt", state)
    save_weights(tmp_path / "b" / "two.pt", last)
    assert (tmp_path / "a" / "one.pt").read_bytes() == (tmp_path / "b" / "two.pt").read_bytes()


def test_a_view_is_saved_without_what_it_views(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.pt", {"fc.weight": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_fingerprint_depends_on_keys_types_shapes_and_values(state: dict[str, Tensor]) -> None:
    expected = fingerprint(state)
    assert re.fullmatch(r"[0-9a-f]{64}", expected)
    assert fingerprint(dict(reversed(state.items()))) == expected
    assert (
        fingerprint({key: value.clone(memory_format=torch.preserve_format) for key, value in state.items()}) == expected
    )
    changed = {key: value.clone() for key, value in state.items()}
    changed["fc.bias"][0] += 1e-6
    assert fingerprint(changed) != expected
    assert fingerprint({**state, "bn1.num_batches_tracked": torch.tensor(1)}) != expected
    assert fingerprint({key.replace("fc", "fd"): value for key, value in state.items()}) != expected
    assert fingerprint({**state, "fc.bias": state["fc.bias"].reshape(2, 5)}) != expected
    assert fingerprint({"a": torch.zeros(2, dtype=torch.int32)}) != fingerprint({"a": torch.zeros(2)})


def test_fingerprint_of_a_known_state_is_its_sha256() -> None:
    """The bytes written out: key, type and shape, each ended by a zero byte, then the values, by sorted key."""
    text = b"a\0torch.float32\0(2,)\0" + np.array([1, 2], np.float32).tobytes()
    text += b"b\0torch.int64\0()\0" + np.int64(5).tobytes()
    state = {"b": torch.tensor(5), "a": torch.tensor([1.0, 2.0])}
    assert fingerprint(state) == hashlib.sha256(text).hexdigest()


# --- which file it was ---


def saved(path: Path, state: dict[str, Tensor], *, legacy: bool) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def test_a_file_without_checksums_is_told_to_be_unverifiable(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "old.pth", state, legacy=True)
    record = load_weights(network(), path, name="resnet8")
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.note is not None
    assert record.note.endswith(f"compare its SHA-256 with the publisher's: {record.sha256}")
    path = saved(tmp_path / "new.pth", state, legacy=False)
    assert load_weights(network(), path, name="resnet8").note is None


def test_a_release_is_known_by_its_hash(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "old.pth", state, legacy=True)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, release in ((f"net-{sha256[:8]}.pth", f"net-{sha256[:8]}"), ("net-0123abcd.pth", None)):
        renamed = path.rename(tmp_path / name)
        assert file_record(renamed).release == release
        path = renamed
    monkeypatch.setitem(torch_files.RELEASES, sha256, "a release")
    record = file_record(path)
    assert (record.release, record.checksums, record.note) == ("a release", False, None)


# --- hostile files ---


def deep_key(depth: int) -> bytes:
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def archive_of(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of one name
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_keys_nested_a_hundred_thousand_deep_are_refused(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "deep.pth"
    if legacy:
        path.write_bytes(torch_files._LEGACY_MAGIC + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + deep_key(100_000))
    else:
        archive_of(path, [("deep/data.pkl", deep_key(100_000)), ("deep/version", b"3\n")])
    assert "nests more than 64 containers" in refusal(path)


def test_compressed_and_ambiguous_archives_are_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.pth", [("a/data.pkl", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch.save never does" in refusal(path)
    path = archive_of(tmp_path / "c.pth", [("notes.txt", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    assert "is a zip archive, not a torch checkpoint: unpack it and name a file in it (it holds: notes.txt)" in refusal(
        path
    )
    path = archive_of(tmp_path / "b.pth", [("a/data.pkl", b"N."), ("a/data.pkl", b"I1\n.")])
    assert "holds two members of one name" in refusal(path)


def test_names_from_a_file_are_shown_harmless_and_short(tmp_path: Path) -> None:
    path = tmp_path / "names.pth"
    torch.save({"\x1b[31mred\nerror: all is well" + "x" * 100_000: 1}, path)
    message = refusal(path)
    assert message.isprintable()
    assert "\\x1b[31mred\\nerror" in message
    assert len(message) < 600


ODD = {
    "a view of less memory": torch.zeros(1).expand(1_000_000_000_000),
    "sparse": torch.zeros(3).to_sparse(),
    "on no device": torch.zeros(3, device="meta"),
    "of many dimensions": torch.zeros([1] * 40),
}


@pytest.mark.parametrize("odd", ODD)
def test_tensors_without_plain_values_are_refused(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    torch.save({"conv1.weight": ODD[odd]}, path)
    assert "conv1.weight is no plain tensor" in refusal(path)


def test_expanded_tensors_of_common_size_load(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "expanded.pth"
    key = next(key for key, value in state.items() if value.ndim == 1)
    torch.save(state | {key: torch.ones(1).expand(state[key].shape)}, path)
    load_weights(network(), path, name="resnet8")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype, tmp_path: Path, state: dict[str, Tensor]) -> None:
    key = next(iter(state))
    path = tmp_path / "kind.pth"
    torch.save(state | {key: state[key].to(dtype)}, path)
    with pytest.raises(UserError, match=rf"{key} is in {dtype}, not in torch.float32"):
        load_weights(network(), path, name="resnet8")
    counter = next((key for key, value in state.items() if not value.is_floating_point()), None)
    if counter is not None and dtype.is_complex:
        torch.save(state | {counter: state[counter].to(dtype)}, path)
        with pytest.raises(UserError, match=rf"{counter} is in {dtype}, not in torch.int64"):
            load_weights(network(), path, name="resnet8")
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, path)
    load_weights(network(), path, name="resnet8")


def test_a_dictionary_that_hides_its_methods_is_read_as_it_is(state: dict[str, Tensor]) -> None:
    """As a file can have it: the attributes of an object are set by what the file says."""
    dressed = OrderedDict(state)
    dressed.__dict__.update(items=1, keys=2, get=3)
    plain = torch_files._plain({"model": dressed})
    assert type(plain["model"]) is dict
    assert_same(plain["model"], state)
