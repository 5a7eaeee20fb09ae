"""Servers on the loopback interface that behave as they are told, for tests of remote files."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What happens to one answer instead of what should: another status, or a connection that is cut after so many
    bytes of the body, or headers that are replaced (None: left out).
    """

    status: int | None = None
    cut_after: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A connection that the other side has dropped is no error here."""


class Site:
    """The files of a folder over HTTP. ``ranges``: whether a part of a file can be had. ``faults``: for the next
    answers, in turn, one each; after them ``fault_for`` says by the number of the request. ``requests``: paths and
    ranges of what was asked for. ``validators``: whether it says an ETag. ``pages``: HTML by path. ``longest_part``:
    the most bytes of one answer to a range.
    """

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.folder = folder
        self.ranges = ranges
        self.faults: list[Fault] = []
        self.fault_for: Callable[[int], Fault] = lambda number: Fault()
        self.requests: list[tuple[str, str | None]] = []
        self.sent_bytes = 0
        self.validators = True
        self.pages: dict[str, str] = {}
        self.longest_part = 1 << 62
        self.silence = threading.Event()  # cleared: no answers
        self.silence.set()
        self.needs: tuple[str, str] | None = None  # a header that every request must have
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def ranges_of(self, name: str) -> list[tuple[int, int]]:
        """First byte and end of each part of a file that was asked for, the first byte alone left out."""
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", span or "") for path, span in self.requests if path == f"/{name}"]
        parts = [(int(one[1]), int(one[2]) + 1) for one in found if one]
        return [part for part in parts if part != (0, 1)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits for an acknowledgement of its headers

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                site.answer(self)

        return Handler

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        span = request.headers.get("Range")
        with self.lock:
            self.requests.append((path, span))
            fault = self.faults.pop(0) if self.faults else self.fault_for(len(self.requests))
        if self.needs is not None and request.headers.get(self.needs[0]) != self.needs[1]:
            fault = Fault(status=403)
        self.silence.wait()
        if path in self.pages:
            self._send(request, 200, {"Content-Type": "text/html"}, self.pages[path].encode(), None)
            return
        file = self.folder / path.lstrip("/")
        if fault.status is None and not file.is_file():
            fault = Fault(status=404)
        if fault.status is not None and fault.status >= 300:
            self._send(request, fault.status, fault.headers, b"no", None)
            return
        content = file.read_bytes()
        headers: dict[str, str | None] = {}
        if self.validators:
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        status, body = 200, content
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", span or "")
        if self.ranges and part is not None:
            first, end = int(part[1]), min(int(part[2]) + 1, len(content))
            end = min(end, first + self.longest_part)
            status, body = (206, content[first:end]) if first < end else (416, b"")
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}" if body else f"bytes */{len(content)}"
        self._send(request, fault.status or status, {**headers, **fault.headers}, body, fault.cut_after)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str | None],
        body: bytes,
        cut_after: int | None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()
        if cut_after is not None:
            body = body[:cut_after]
            request.close_connection = True
        with self.lock:
            self.sent_bytes += len(body)
        try:
            request.wfile.write(body)
        except OSError:  # the other side has seen enough
            request.close_connection = True


@contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[Site]:
    """A site, closed at the end, and with it fsspec's connections to it."""
    from fsspec.implementations.http import HTTPFileSystem

    site = Site(folder, ranges=ranges)
    try:
        yield site
    finally:
        forget(HTTPFileSystem)
        site.close()


def forget(kind: type) -> None:
    """Close the sessions of one of fsspec's file systems, which it keeps for good otherwise."""
    from fsspec.asyn import sync

    for filesystem in list(kind._cache.values()):  # type: ignore[attr-defined]
        if getattr(filesystem, "_session", None) is not None:
            sync(filesystem.loop, filesystem._session.close)
    kind.clear_instance_cache()  # type: ignore[attr-defined]


@dataclass
class Waits:
    """A ``sleep`` that takes no time and remembers."""

    seconds: list[float] = field(default_factory=list)
    then: Callable[[], object] | None = None

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.then is not None:
            self.then()
