"""Everything that can go wrong between a client and an S3 server, by rule: an HTTP/1.1 proxy on the loopback.

    with FaultProxy(server_url) as proxy:              # clients use proxy.url for their endpoint
        proxy.add(Fault(kind="status", status=503, times=3), Fault(kind="flip", path=r"shard\\.00001"))
        ...
        assert proxy.counts()["status 503"] == 3

The proxy is a process of its own: what tests fork would hold its sockets open, and no connection would ever be reset or
refused. Commands go over its stdin, a line of JSON each. Signatures cover the Host header, which is passed on as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tools.ports import free_ports

Kind = Literal[
    "status",  # an error instead of an answer; the request does not reach the server
    "reset",  # the connection breaks in the middle of the answer's body
    "truncate",  # status 200, half of the body, then a regular end: shorter than its content-length
    "shorten",  # status 200, half of the body, with a content-length that fits
    "flip",  # one bit of the answer's body
    "slow",  # a byte of the body a second, endlessly
    "silent",  # the request is taken, and nothing ever comes back
    "late",  # a fifth of a second before the request is sent to the server
    "reset upload",  # the connection breaks in the middle of the request's body
    "flip upload",  # one bit of the request's body, which then reaches the server
    "lose answer",  # the server does what it was asked to, and the connection breaks before it can say so
]
ERROR_CODES = {403: "AccessDenied", 404: "NoSuchBucket", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}
HOP_BY_HOP = {"connection", "keep-alive", "expect", "transfer-encoding", "content-length"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of requests of `method` whose path (with its query) matches `path`."""

    kind: Kind
    status: int = 503
    """The status, for the kind `status`."""
    method: str = "GET|PUT|POST|HEAD|DELETE"
    path: str = ""
    skip: int = 0
    """The number of requests that pass first."""
    times: int | None = None
    """The number of requests that fail; by default all."""
    seconds: float | None = None
    """The seconds that the fault lasts, from the beginning of the rule."""
    chance: float = 1.0

    @property
    def name(self) -> str:
        return f"status {self.status}" if self.kind == "status" else self.kind


class FaultProxy:
    """A running proxy before `upstream`, a server's URL. Faults are tried in the order of their rules."""

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        (self.port,) = free_ports(1)  # stays ours while connections are refused
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_proxy", *map(str, (urlsplit(upstream).port, self.port, seed))],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._receive() == self.port
        self.url = f"http://127.0.0.1:{self.port}"

    def add(self, *faults: Fault) -> None:
        self._ask("add", [asdict(fault) for fault in faults])

    def clear(self) -> None:
        """Forget all rules; what is slow or silent at this moment stays so."""
        self._ask("clear", None)

    def refuse(self) -> None:
        """Refuse connections, and break those that there are, until `accept`."""
        self._ask("refuse", None)

    def accept(self) -> None:
        self._ask("accept", None)

    def counts(self) -> Counter[str]:
        """Faults done, by name, since the beginning."""
        return Counter(self._ask("counts", None))

    def requests(self) -> list[tuple[str, str, str]]:
        """(method, path with query, fault or ''), of each request since the last call."""
        return [(method, path, fault) for method, path, fault in self._ask("requests", None)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, command: str, argument: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, argument]).encode() + b"\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


# The code below runs in the proxy's own process.


class Broken(Exception):
    """The connection is to be reset."""


@dataclass(kw_only=True)
class Message:
    """A request or an answer: its first line, headers as they came, and the whole body."""

    first_line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def head(self, *, content_length: int | None) -> bytes:
        lines = [self.first_line, *(f"{k}: {v}" for k, v in self.headers if k.lower() not in HOP_BY_HOP)]
        if content_length is not None:
            lines.append(f"Content-Length: {content_length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Server:
    def __init__(self, upstream_port: int, port: int, *, seed: int) -> None:
        self.upstream_port, self.port = upstream_port, port
        self.random = random.Random(seed)
        self.rules: list[tuple[Fault, float]] = []
        self.matched: Counter[int] = Counter()
        self.struck: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str]] = []
        self.connections: set[asyncio.StreamWriter] = set()
        self.listening: asyncio.Server | None = None

    async def accept(self) -> None:
        if self.listening is None:
            self.listening = await asyncio.start_server(self.serve, "127.0.0.1", self.port, limit=1 << 20)

    def refuse(self) -> None:
        if self.listening is not None:
            self.counts["refuse"] += 1
            self.listening.close()
            self.listening = None
        for writer in self.connections:
            reset(writer)

    async def obey(self, command: str, argument: Any) -> Any:
        match command:
            case "add":
                self.rules += [(Fault(**values), time.monotonic()) for values in argument]
            case "clear":
                self.rules, self.matched, self.struck = [], Counter(), Counter()
            case "refuse":
                self.refuse()
            case "accept":
                await self.accept()
            case "counts":
                return self.counts
            case "requests":
                seen, self.requests = self.requests, []
                return seen
        return None

    def choose(self, method: str, path: str) -> Fault | None:
        for i, (fault, began) in enumerate(self.rules):
            if not (re.fullmatch(fault.method, method) and re.search(fault.path, path)):
                continue
            self.matched[i] += 1
            over = fault.seconds is not None and time.monotonic() - began > fault.seconds
            done = fault.times is not None and self.struck[i] >= fault.times
            if over or done or self.matched[i] <= fault.skip or self.random.random() >= fault.chance:
                continue
            self.struck[i] += 1
            self.counts[fault.name] += 1
            return fault
        return None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            while True:
                await self.exchange(reader, writer)
        except Broken:
            reset(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers = await read_head(reader)
        method, path, _ = line.split(" ", 2)
        fault = self.choose(method, path)
        kind = fault.kind if fault else None
        self.requests.append((method, path, fault.name if fault else ""))
        if any(key.lower() == "expect" for key, _ in headers):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
        if kind == "reset upload":
            await reader.readexactly(body_length(headers) // 2)
            raise Broken
        request = Message(first_line=line, headers=headers, body=await read_body(reader, headers))
        if kind == "silent":
            await asyncio.sleep(3600)
        if kind == "late":
            await asyncio.sleep(0.2)
        if fault is not None and kind == "status":
            answer = error_answer(fault.status)
        else:
            if kind == "flip upload":
                request.body = flipped(request.body)
            answer = await self.forward(request)
        if kind == "lose answer":
            raise Broken
        if kind == "flip":
            answer.body = flipped(answer.body)
        length: int | None = len(answer.body)
        if method == "HEAD":  # what its body would have, and none comes
            length, answer.body = int(answer.header("content-length") or 0), b""
        half = answer.body[: len(answer.body) // 2]
        match kind:
            case "shorten":
                writer.write(answer.head(content_length=len(half)) + half)
            case "truncate" | "reset":
                writer.write(answer.head(content_length=length) + half)
                await writer.drain()
                if kind == "reset":
                    await asyncio.sleep(0.05)  # else what was sent is lost with the connection
                    raise Broken
                raise ConnectionError
            case "slow":
                writer.write(answer.head(content_length=length))
                for i in range(len(answer.body)):
                    writer.write(answer.body[i : i + 1])
                    await writer.drain()
                    await asyncio.sleep(1)
            case _:
                no_body = answer.first_line.split(" ")[1] in ("204", "304")
                writer.write(answer.head(content_length=None if no_body else length) + answer.body)
        await writer.drain()

    async def forward(self, request: Message) -> Message:
        """The server's answer, on a connection of its own: the server may have been restarted since the last one."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=1 << 20)
        except OSError:
            raise Broken from None
        try:
            has_body = request.body or request.header("content-length")
            head = request.head(content_length=len(request.body) if has_body else None)
            writer.write(head[:-2] + b"Connection: close\r\n\r\n" + request.body)
            await writer.drain()
            line, headers = await read_head(reader)
            empty = request.first_line.startswith("HEAD ") or line.split(" ")[1] in ("204", "304")
            return Message(
                first_line=line, headers=headers, body=b"" if empty else await read_body(reader, headers, answer=True)
            )
        except (ConnectionError, asyncio.IncompleteReadError):
            raise Broken from None
        finally:
            writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST: no regular end, and what was not sent yet is thrown away."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def error_answer(status: int) -> Message:
    code = ERROR_CODES[status]
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>'
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    return Message(first_line=f"HTTP/1.1 {status} {code}", headers=headers, body=body.encode())


def flipped(body: bytes) -> bytes:
    """The body with one bit in its middle changed."""
    if not body:
        return body
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


async def read_head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = [(key, value.strip()) for key, _, value in (line.partition(":") for line in lines[1:] if line)]
    return lines[0], headers


def body_length(headers: list[tuple[str, str]]) -> int:
    return next((int(value) for key, value in headers if key.lower() == "content-length"), 0)


async def read_body(reader: asyncio.StreamReader, headers: list[tuple[str, str]], *, answer: bool = False) -> bytes:
    names = {key.lower(): value for key, value in headers}
    if "chunked" in names.get("transfer-encoding", ""):
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        while (await reader.readuntil(b"\r\n")) != b"\r\n":
            pass
        return body
    if answer and "content-length" not in names:
        return await reader.read()
    return await reader.readexactly(body_length(headers))


async def run(upstream_port: int, port: int, seed: int) -> None:
    server = Server(upstream_port, port, seed=seed)
    await server.accept()
    commands = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print(server.port, flush=True)
    while line := await commands.readline():
        print(json.dumps(await server.obey(*json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(run(*map(int, sys.argv[1:])))
