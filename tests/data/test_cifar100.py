"""CIFAR-100: what is read from the published layout, what is refused, and fetching over a loopback server."""

import codecs
import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100
from torchvision.transforms import Compose, Normalize, ToTensor

import mdistill.data.cifar100 as module
from mdistill.data import DATASETS, InMemoryDataset
from mdistill.data.cifar100 import cifar100
from mdistill.errors import RunFailed, UserError

Entries = dict[str, dict[str, Any]]


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did, protocol 2: text and bytes both as byte strings, NumPy by its old name."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    def save_function(self, value: Any) -> None:
        self.write(pickle.GLOBAL + b"numpy.core.multiarray\n" + value.__name__.encode() + b"\n")
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type(np.empty(0).__reduce__()[0])] = save_function


def dump_python2(entry: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(entry)
    return buffer.getvalue()


def same_pixels(data: InMemoryDataset, entries: Entries) -> bool:
    """The test split holds the entries' pixels and fine labels."""
    pixels = entries["test"]["data"].reshape(-1, 3, 32, 32)
    image, target = next(data.eval_batches("test", 1000))
    value = torch.from_numpy(pixels).float() / 255
    expected = (value - torch.tensor(module.MEAN).view(3, 1, 1)) / torch.tensor(module.STD).view(3, 1, 1)
    return torch.equal(image, expected) and target.tolist() == entries["test"]["fine_labels"]


# Reading


def test_the_published_constants():
    assert module.URL == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert module.SAMPLES == {"train": 50_000, "test": 10_000}
    assert module.MEAN == (0.5071, 0.4867, 0.4408)
    assert module.STD == (0.2675, 0.2565, 0.2761)
    assert CIFAR100.tgz_md5 == module.ARCHIVE_MD5
    official = dict([*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])])
    assert official == module.FILE_MD5


def test_builds_by_name_and_equals_torchvisions_reading(write_cifar, entries: Entries, monkeypatch):
    root = write_cifar(entries)
    data = DATASETS.build("cifar100", root, False)
    assert (data.num_classes, data.num_samples, data.image_size, data.num_views) == (100, 300, 32, 162)
    assert data.splits == ("test",)
    assert data.size("test") == 100
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    transform = Compose([ToTensor(), Normalize(module.MEAN, module.STD)])
    reference = CIFAR100(str(root), train=False, transform=transform)
    image, target = next(data.eval_batches("test", 100))
    for number, (expected, label) in enumerate(reference):
        assert torch.equal(image[number], expected)
        assert target[number] == label


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(write_cifar, entries: Entries, protocol: int):
    assert same_pixels(
        cifar100(write_cifar(entries, functools.partial(pickle.dumps, protocol=protocol)), False), entries
    )


@pytest.mark.parametrize("protocol", [2, 4])
def test_keys_of_bytes_are_read(write_cifar, entries: Entries, protocol: int):
    as_bytes = {name: {key.encode(): value for key, value in entry.items()} for name, entry in entries.items()}
    assert same_pixels(
        cifar100(write_cifar(as_bytes, functools.partial(pickle.dumps, protocol=protocol)), False), entries
    )


def test_pickles_of_python_2_are_read(write_cifar, entries: Entries):
    root = write_cifar(entries, dump_python2)
    assert b"numpy.core.multiarray" in (root / "cifar-100-python" / "test").read_bytes()
    assert same_pixels(cifar100(root, False), entries)


def test_labels_may_be_an_array(write_cifar, entries: Entries):
    entries["test"]["fine_labels"] = np.array(entries["test"]["fine_labels"])
    assert cifar100(write_cifar(entries), False).size("test") == 100


def test_the_root_may_be_the_folder_itself_under_any_name(write_cifar, entries: Entries, tmp_path: Path):
    folder = write_cifar(entries) / "cifar-100-python"
    assert same_pixels(cifar100(folder, False), entries)
    renamed = folder.rename(tmp_path / "cifar")
    assert same_pixels(cifar100(renamed, False), entries)


def test_the_fingerprint_does_not_depend_on_the_packing(write_cifar, entries: Entries):
    first = cifar100(write_cifar(entries), False)
    second = cifar100(write_cifar(entries, dump_python2, root="other"), False)
    assert first.fingerprint() == second.fingerprint()
    assert first.notes != second.notes  # which name the MD5 sums


def test_files_that_are_not_the_published_ones_are_noted(write_cifar, entries: Entries, monkeypatch):
    root = write_cifar(entries)
    content = {name: (root / "cifar-100-python" / name).read_bytes() for name in entries}
    md5 = {name: hashlib.md5(value).hexdigest() for name, value in content.items()}
    notes = cifar100(root, False).notes
    assert sorted(notes) == sorted(
        f"cifar100: {name} has MD5 {md5[name]}, the published file {module.FILE_MD5[name]}" for name in md5
    )
    monkeypatch.setattr(module, "FILE_MD5", md5)
    assert cifar100(root, False).notes == []


def test_images_shared_by_train_and_test_are_counted(write_cifar, entries: Entries):
    entries["test"]["data"][[5, 6, 7]] = entries["train"]["data"][[1, 1, 200]]
    entries["test"]["data"][8, 0] ^= 1  # near, not equal
    notes = cifar100(write_cifar(entries), False).notes
    assert notes[-1] == "cifar100: 3 test images are also training images, pixel for pixel"


def test_too_many_shared_images_are_refused(write_cifar, entries: Entries, monkeypatch):
    monkeypatch.setattr(module, "MAX_SHARED", 20)
    entries["test"]["data"][:21] = entries["train"]["data"][:21]
    with pytest.raises(UserError, match="21 of the test images are also training images, at most 20 may be"):
        cifar100(write_cifar(entries), False)


# What is refused


def refusal(root: Path, download: bool = False) -> str:
    """The message of the one-line error that reading ``root`` raises."""
    with pytest.raises(UserError) as error:
        cifar100(root, download)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_data_names_the_folder_and_the_way_out(tmp_path: Path):
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "cifar-100-python") in message
    assert "--download" in message
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_file_is_named(write_cifar, entries: Entries):
    root = write_cifar(entries)
    (root / "cifar-100-python" / "meta").unlink()
    assert f"not complete in {root / 'cifar-100-python'}: no meta;" in refusal(root)


def test_wrong_sizes_are_refused(write_cifar, entries: Entries, monkeypatch):
    root = write_cifar(entries)
    monkeypatch.setattr(module, "SAMPLES", {"train": 50_000, "test": 10_000})
    assert refusal(root).endswith("train: 'data' must be uint8 (50000, 3072), found uint8 (300, 3072)")


@pytest.mark.parametrize(
    ("split", "key", "value", "text"),
    [
        (
            "train",
            "data",
            np.zeros((300, 3072), np.float32),
            "'data' must be uint8 (300, 3072), found float32 (300, 3072)",
        ),
        ("test", "data", np.zeros((100, 3000), np.uint8), "'data' must be uint8 (100, 3072), found uint8 (100, 3000)"),
        ("test", "data", None, "'data' must be uint8 (100, 3072), found NoneType"),
        ("test", "fine_labels", [0] * 99, "'fine_labels' must be 100 integers, found 99"),
        ("test", "fine_labels", "many", "'fine_labels' must be 100 integers, found str"),
        ("test", "fine_labels", [0] * 99 + [100], "'fine_labels' must be from 0 to 99, found 100"),
        ("test", "fine_labels", [0] * 99 + [-1], "'fine_labels' must be from 0 to 99, found -1"),
        ("test", "fine_labels", [0] * 99 + [1.5], "'fine_labels' must be from 0 to 99, found 1.5"),
        ("meta", "fine_label_names", ["cat"] * 10, "'fine_label_names' must be a list of 100 names, found 10"),
    ],
)
def test_wrong_content_is_refused(write_cifar, entries: Entries, split: str, key: str, value: Any, text: str):
    entries[split][key] = value
    root = write_cifar(entries)
    assert refusal(root) == f"{root / 'cifar-100-python' / split}: {text}"


def test_a_file_of_cifar10_is_refused(write_cifar, entries: Entries):
    entries["train"]["labels"] = entries["train"].pop("fine_labels")
    assert refusal(write_cifar(entries)).endswith("train: 'fine_labels' must be 300 integers, found NoneType")


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_file_is_refused(write_cifar, entries: Entries, keep: int):
    root = write_cifar(entries)
    path = root / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is damaged or not a pickle" in refusal(root)


def test_a_file_of_something_else_is_refused(write_cifar, entries: Entries):
    root = write_cifar(entries)
    path = root / "cifar-100-python" / "train"
    path.write_bytes(b"<!DOCTYPE html><title>404</title>")
    assert f"{path} is damaged or not a pickle" in refusal(root)
    path.write_bytes(pickle.dumps([1, 2]))
    assert refusal(root) == f"{path} must hold a dictionary, found list"


class Hostile:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("call", [eval, exec, os.system, __import__])
def test_a_hostile_pickle_is_refused_and_nothing_is_executed(write_cifar, entries: Entries, tmp_path: Path, call: Any):
    mark = tmp_path / "mark"
    entries["train"]["data"] = Hostile(call, f"open({str(mark)!r}, 'w')")
    message = refusal(write_cifar(entries))
    assert "nothing was executed" in message
    assert call.__name__ in message
    assert not mark.exists()


def test_a_hostile_codec_is_refused(write_cifar, entries: Entries):
    entries["train"]["data"] = Hostile(codecs.encode, "x", "punycode")
    assert "encoding 'punycode', only 'latin1' is read" in refusal(write_cifar(entries))


# Fetching


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Silent."""


class TruncatingHandler(Handler):
    """Promises a large archive, sends a part of it, and hangs up."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"part")


@contextmanager
def serve(folder: Path, handler: type[Handler] = Handler) -> Iterator[str]:
    """A loopback server of a folder: its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def archive(write_cifar, entries: Entries, tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """An archive as published, served at ``URL``, which has the MD5 sum that is asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = tmp_path / "served" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(write_cifar(entries, root="packed") / "cifar-100-python", "cifar-100-python")
    use(path, monkeypatch)
    with serve(path.parent) as address:
        monkeypatch.setattr(module, "URL", address + path.name)
        yield path


def use(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())


def test_download_puts_the_three_files_in_place(archive: Path, entries: Entries, tmp_path: Path):
    root = tmp_path / "new" / "root"
    assert same_pixels(cifar100(root, True), entries)
    assert [path.name for path in root.iterdir()] == ["cifar-100-python"]
    assert sorted(path.name for path in (root / "cifar-100-python").iterdir()) == ["meta", "test", "train"]


def test_download_fetches_nothing_where_the_files_are(archive: Path, entries: Entries, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "URL", "http://127.0.0.1:1/never")
    assert same_pixels(cifar100(tmp_path / "packed", True), entries)


def test_download_completes_an_incomplete_folder(archive: Path, entries: Entries, tmp_path: Path):
    folder = tmp_path / "packed" / "cifar-100-python"
    (folder / "train").unlink()
    assert same_pixels(cifar100(tmp_path / "packed", True), entries)
    assert [path.name for path in folder.parent.iterdir()] == ["cifar-100-python"]


def test_another_archive_is_refused_and_nothing_is_kept(archive: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "ARCHIVE_MD5", "0" * 32)
    root = tmp_path / "root"
    message = refusal(root, download=True)
    assert f"gave {archive.stat().st_size} bytes with MD5" in message
    assert "0" * 32 in message
    assert list(root.iterdir()) == []


def test_a_broken_off_download_is_refused_and_nothing_is_kept(archive: Path, tmp_path: Path, monkeypatch):
    root = tmp_path / "root"
    with serve(tmp_path, TruncatingHandler) as address:
        monkeypatch.setattr(module, "URL", address)
        message = refusal(root, download=True)
    assert address in message
    assert list(root.iterdir()) == []


def test_no_answer_and_no_such_file_are_told_apart_and_say_what_to_do(archive: Path, tmp_path: Path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{port}/cifar.tar.gz")
    message = refusal(tmp_path / "root", download=True)
    assert f"could not download http://127.0.0.1:{port}/cifar.tar.gz: " in message
    assert "refused" in message
    assert "unpack it under the data root as cifar-100-python/" in message
    with serve(tmp_path) as address:
        monkeypatch.setattr(module, "URL", address + "gone.tar.gz")
        assert "404" in refusal(tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_an_archive_without_a_file_is_refused(archive: Path, tmp_path: Path, monkeypatch):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "packed" / "cifar-100-python" / "train", "cifar-100-python/train")
    use(archive, monkeypatch)
    assert "could not unpack" in refusal(tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_file_that_is_no_archive_is_refused(archive: Path, tmp_path: Path, monkeypatch):
    archive.write_bytes(b"not a tar file")
    use(archive, monkeypatch)
    assert "could not unpack" in refusal(tmp_path / "root", download=True)


def test_only_the_three_files_leave_the_archive(archive: Path, tmp_path: Path, monkeypatch):
    packed = tmp_path / "packed" / "cifar-100-python"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(packed, "cifar-100-python")
        tar.add(packed / "meta", "../escaped")
        tar.add(packed / "meta", "cifar-100-python/more")
    use(archive, monkeypatch)
    cifar100(tmp_path / "root", True)
    assert not (tmp_path / "escaped").exists()
    assert len(list((tmp_path / "root" / "cifar-100-python").iterdir())) == 3


def test_a_link_in_the_archive_is_not_followed(archive: Path, tmp_path: Path, monkeypatch):
    packed = tmp_path / "packed" / "cifar-100-python"
    (packed / "meta").unlink()
    (packed / "meta").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(packed, "cifar-100-python")
    use(archive, monkeypatch)
    assert "could not unpack" in refusal(tmp_path / "root", download=True)


def test_an_interruption_leaves_nothing_behind(archive: Path, tmp_path: Path, monkeypatch):
    copied = []

    def interrupted(source: Any, target: Any) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(target.write(source.read()))

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar100(tmp_path / "root", True)
    assert copied
    assert list((tmp_path / "root").iterdir()) == []


def test_a_root_that_cannot_be_written_is_named(archive: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFailed, match=f"could not put CIFAR-100 into {tmp_path / 'file'}"):
        cifar100(tmp_path / "file", True)
