"""``mdistill watch``: a local page that follows running work."""

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mdistill.cli import common
from mdistill.errors import UserError
from mdistill.reporting.watch_page import Parts, content_policy
from mdistill.reporting.watching import Watch

DESCRIPTION = """Serve a page that follows the runs below the given folders: what runs, how far it is, curves, images a
second and time left, what failed and why, and who trains which run of a table. It renews itself. It is served to this
machine alone; Ctrl+C ends it. Runs are not touched: nothing is written, nothing is locked."""

EXAMPLES = f"""  mdistill watch
  mdistill watch runs /shared/runs --hours 72
  mdistill watch --port 8008       over ssh: ssh -L 8008:localhost:8008 MACHINE, then http://localhost:8008 here

{common.EXIT_CODES}"""

LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")  # as a browser of this machine, or by ssh, asks
OFTEN = 1.0  # seconds between two looks at the runs, however many pages are open


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"should be a number from 0 to 65535, found {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.plain_parser("watch", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "runs", metavar="RUNS", type=common.path, nargs="*", help="folders with runs below (default: runs)"
    )
    parser.add_argument("--port", type=_port, default=0, help="of the page's address (default: a free one)")
    parser.add_argument(
        "--hours", type=common.positive, default=24.0, help="how long a run that has ended is shown (%(default)g)"
    )
    return parser.parse_args(arguments)


class Server(ThreadingHTTPServer):
    """Serves the page about what ``watch`` sees, at 127.0.0.1."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, watch: Watch, port: int = 0) -> None:
        self._watch, self._parts, self._lock = watch, Parts(), threading.Lock()
        self._looked = float("-inf")
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def answer(self, since: int | None) -> str:
        """The page, or as JSON what has changed after version ``since`` of it."""
        with self._lock:
            if time.monotonic() - self._looked >= OFTEN:
                self._parts.update(self._watch.view())
                self._looked = time.monotonic()
            return self._parts.page() if since is None else json.dumps(self._parts.since(since))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is nobody's matter; anything else is said."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of two addresses. No file is named by a request."""

    server: Server
    server_version, sys_version = "mdistill", ""
    timeout = 30.0

    def do_GET(self) -> None:
        # A page of another site can let its own name lead here; the browser then sends that name.
        if not LOCAL.fullmatch(self.headers.get("Host", "")):
            self.send_error(403, "this page is for this machine alone")
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._send(self.server.answer(None), "text/html; charset=utf-8")
        elif asked.path == "/changes":
            (since, *_) = parse_qs(asked.query).get("since", ["0"])
            self._send(
                self.server.answer(int(since) if since.isdecimal() and len(since) < 20 else 0), "application/json"
            )
        else:
            self.send_error(404)

    def _send(self, content: str, kind: str) -> None:
        body = content.encode("utf-8", errors="replace")
        self.send_response(200)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            **({"Content-Security-Policy": content_policy(content)} if kind.startswith("text/html") else {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed for a request."""


def watch(args: argparse.Namespace) -> None:
    runs = args.runs or [common.path("runs")]
    try:
        server = Server(Watch(runs, hours=args.hours), args.port)
    except OSError as error:
        raise UserError(f"--port: {args.port} cannot be had: {error.strerror}; leave it out for a free one") from None
    with server:
        print(f"{server.address} follows {', '.join(map(str, runs))}; Ctrl+C ends it", flush=True)
        server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> int:
    return common.run(watch, parse, arguments, when_stopped="the page is not served any more; runs go on")
