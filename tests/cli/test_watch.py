"""``mdistill watch``: the page as it is served, and one line for each mistake."""

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from mdistill.cli.main import main
from mdistill.cli.watch import Server
from mdistill.config import load
from mdistill.reporting.watching import Watch

from ..conftest import refused
from ..reporting.written_records import write_record

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cifar100"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_record(tmp_path, load(CONFIGS / "kd" / "res56_res20.yaml", seed=0), [10.0, 20.0])
    with Server(Watch([tmp_path])) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    """The answer to a request."""
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response, content


def test_the_page_and_its_changes(server: Server) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.address)
    response, page = ask(server, "/")
    assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "script-src 'sha256-" in response.headers["Content-Security-Policy"]
    assert response.headers["Cache-Control"] == "no-store"
    assert "epoch 2 of 240" in page
    version = int(page.partition('data-version="')[2].partition('"')[0])
    response, content = ask(server, f"/changes?since={version}")
    changes = json.loads(content)
    assert (changes["version"], changes["parts"]) == (version, {})
    for since in ("", "?since=0", "?since=-1", "?since=" + "9" * 99, "?since=%2e%2e", "?since="):
        assert len(json.loads(ask(server, f"/changes{since}")[1])["parts"]) == 3


def test_what_is_not_its_page_is_refused(server: Server) -> None:
    for path in ("/../../etc/passwd", "/metrics.jsonl", "/%2e%2e/", "/changes/x"):
        assert ask(server, path)[0].status == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(server, "/", method)[0].status == 501, method
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil:8000", "[::2]:1"):
        assert ask(server, "/changes", Host=host)[0].status == 403, host
    for host in ("localhost", "localhost:8008", "127.0.0.1:1", "[::1]:8008", "[::1]"):
        assert ask(server, "/changes", Host=host)[0].status == 200, host


def test_it_is_served_to_this_machine_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_it_ends_with_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Server) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert main(["watch"]) == 75
    told = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ follows runs; Ctrl\+C ends it\n", told.out)
    assert told.err == "SIGINT: stopped, the page is not served any more; runs go on\n"


def test_mistakes_are_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, main(["watch"])) == "error: no such folder: runs"
    taken = server.server_address[1]
    assert refused(capsys, main(["watch", str(tmp_path), "--port", str(taken)])).startswith(
        f"error: --port: {taken} cannot be had: Address already in use; leave it out"
    )
    for flags, line in (
        (["--port", "x"], "error: argument --port: should be a number from 0 to 65535, found 'x' (see --help)"),
        (["--hours", "0"], "error: argument --hours: should be a number above 0, found '0' (see --help)"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["watch", *flags])
        assert refused(capsys, int(ended.value.code or 0)) == line
