"""http and https, through the session and the request options of fsspec's file system.

fsspec's own reading hands out whatever the body is. Here the answer's header has to say which version of the file its
body is of, and which bytes (RFC 9110, sections 8.8 and 14), and that is compared before a byte of the body is used.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from odewei.errors import CheckpointError, UnsafeCheckpointError
from odewei.loaders.remote_transport import (
    Found,
    RangeIgnoredError,
    Target,
    Transport,
    as_transient,
    changed,
    not_found,
    refused,
)
from odewei.loaders.retries import TransientError

__all__ = ["HttpTransport"]

_Value = TypeVar("_Value")
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}


class HttpTransport(Transport):
    """One attempt over HTTP."""

    def look(self) -> Found:
        return self._guarded(self._look)

    def read(self, expected: Found, offset: int, target: Target) -> None:
        self._guarded(self._read, expected, offset, target)

    def whole(self, expected: Found, piece_nbytes: int) -> Iterator[bytes]:
        response = self._guarded(self._get, None, expected.size)
        try:
            self._check_whole(response, expected)
            left = expected.size
            while left:
                piece = self._guarded(response.content.readexactly, min(piece_nbytes, left))
                left -= len(piece)
                yield piece
        finally:
            response.close()

    def list(self) -> list[str]:
        """The links of the folder's page that lead to files in it."""
        folder = self.path.url.partition("?")[0].rstrip("/") + "/"
        try:
            links = self.sync(self.filesystem._ls, folder, detail=False, timeout=self.limit_seconds(0))
        except Exception:  # there is no page, or it is none; what follows is that no file was found
            return []
        names = [str(link)[len(folder) :] for link in links if str(link).startswith(folder)]
        return [name for name in names if re.fullmatch(r"[\w.-]+", name)]

    # -- in fsspec's thread ------------------------------------------------------------------------------------------

    async def _look(self) -> Found:
        """Ask for the first byte: a URL that is signed for GET refuses HEAD, and only an answer to a range tells
        whether there are ranges.
        """
        response = await self._get("bytes=0-0", 1)
        try:
            identity = _identity(response.headers)
            if response.status == 206:
                size = self._content_range(response)[2]
                await response.content.read(1)  # so that the connection can be used again
                return Found(size, identity, True)
            if response.status == 416:
                empty = re.fullmatch(r"bytes \*/0", response.headers.get("Content-Range", ""))
                return Found(0, identity, True) if empty else self._refuse("refuses to send its first byte (416)")
            length = response.headers.get("Content-Length", "")
            if not length.isdigit():
                self._refuse("does not say how long the file is")
            return Found(int(length), identity, False)
        finally:
            response.release() if response.status == 206 else response.close()

    async def _read(self, expected: Found, offset: int, target: Target) -> None:
        end = offset + target.left
        response = await self._get(f"bytes={offset}-{end - 1}", target.left)
        try:
            if response.status == 200:
                if offset != target.done or offset + target.left != expected.size:
                    raise RangeIgnoredError
                self._check_whole(response, expected)
                target.rewind()
            else:
                self._check_part(response, expected, offset, end)
            async for chunk in response.content.iter_any():
                target.put(chunk)
            if target.left:
                raise TransientError(f"the answer ended {target.left} bytes too early")
        finally:
            response.close() if target.left else response.release()

    async def _get(self, range_header: str | None, nbytes: int) -> Any:
        """The answer, whose body is not read yet; its status is 200, 206 or 416."""
        import aiohttp

        session = await self.filesystem.set_session()
        seconds = self.timeout_seconds
        timeout = aiohttp.ClientTimeout(total=self.limit_seconds(nbytes), sock_connect=seconds, sock_read=seconds)
        options = {"timeout": timeout, "read_bufsize": 1 << 18, **self.filesystem.kwargs}
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if range_header is not None:
            headers["Range"] = range_header
        response = await session.get(self.filesystem.encode_url(self.path.url), headers=headers, **options)
        try:
            self._check(response)
        except BaseException:
            response.close()
            raise
        return response

    # -- what an answer must say -------------------------------------------------------------------------------------

    def _check(self, response: Any) -> None:
        if self.path.protocol == "https" and response.url.scheme != "https":
            raise UnsafeCheckpointError(
                "the server leads from https to a connection that anybody can change",
                file=str(self.path),
                cure="Use an address that stays with https",
            )
        self._check_status(response.status, response.headers)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            self._refuse("sends the file compressed, although it was asked not to")

    def _check_status(self, status: int, headers: Mapping[str, str]) -> None:
        if status in (200, 206, 416):
            return
        if status in _MAY_PASS:
            after = headers.get("Retry-After", "")
            raise TransientError(f"the server answers {status}", after_seconds=float(after) if after.isdigit() else 0.0)
        if status in (404, 410):
            raise not_found(self.path, f"the server answers {status}")
        if status in (401, 403, 407):
            raise refused(self.path, f"the server answers {status}")
        self._refuse(f"answers {status}")

    def _check_part(self, response: Any, expected: Found, offset: int, end: int) -> None:
        """Whether the body is what was asked for, of the version that is expected."""
        if response.status == 416:
            raise changed(self.path)
        begin, last, size = self._content_range(response)
        if size != expected.size or _identity(response.headers) != expected.identity:
            raise changed(self.path)
        length = response.headers.get("Content-Length", "")
        if begin != offset or last >= end or (length and length != str(last + 1 - begin)):
            answer = f"{begin} to {last}, {length or 'no'} bytes"
            self._refuse(f"was asked for the bytes {offset} to {end - 1} and says that it sends {answer}")

    def _check_whole(self, response: Any, expected: Found) -> None:
        if response.status != 200:
            self._refuse(f"answers {response.status} where the whole file was asked for")
        length = response.headers.get("Content-Length", "")
        if length != str(expected.size) or _identity(response.headers) != expected.identity:
            raise changed(self.path)

    def _content_range(self, response: Any) -> tuple[int, int, int]:
        """First and last byte, and the size of the file, that the answer says its body is of."""
        text = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)
        if found is None or int(found[2]) < int(found[1]):
            self._refuse(f"sends a part of the file and does not say which (Content-Range: {text[:80]!r})")
        return int(found[1]), int(found[2]), int(found[3])

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"the server {problem}", file=str(self.path), cure="Use another address of the file")

    def _guarded(self, function: Callable[..., Awaitable[_Value]], *args: object) -> _Value:
        """Run a coroutine; what the libraries raise becomes one of ours."""
        import aiohttp

        try:
            return self.sync(function, *args)
        except CheckpointError:
            raise
        except aiohttp.ClientResponseError as error:  # too many redirects, or a session of the user's that raises
            self._check_status(error.status, error.headers or {})
            raise TransientError(f"the answer cannot be understood: {error.message}") from error
        except (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError) as error:
            problem = f"no connection: {type(error).__name__}: {error}"
            raise CheckpointError(problem, file=str(self.path), cure="Check the address") from error
        except TimeoutError as error:
            raise TransientError("the server was silent, or too slow, for too long") from error
        except (aiohttp.ClientError, EOFError, OSError, RuntimeError) as error:  # RuntimeError: closed under a reader
            raise as_transient(error) from error


def _identity(headers: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{key}: {headers[key]}" for key in ("ETag", "Last-Modified") if key in headers)
