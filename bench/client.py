"""A client of one HTTP connection. It shares the machine with what it measures, so it does as little as it can."""

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

import httptools


class Connection(asyncio.Protocol):
    """Posts JSON to `url`, one call after the other; opened by the first, and again where the server closed it."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port or 80
        lines = [f"POST {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._head = "\r\n".join([*lines, "Content-Length: "]).encode()
        self._transport: asyncio.Transport | None = None

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """The answer's status and body. Raises OSError where there is none."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self._transport, _ = await loop.create_connection(lambda: self, *self._address)
        self._answered: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        return await self._answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(error or ConnectionResetError("closed before the answer had come"))

    # What httptools calls.

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if not self._parser.should_keep_alive():
            self._transport.close()
        self._answered.set_result((self._parser.get_status_code(), self._body))
