"""Each fault changes plain HTTP exchanges as its name says, and no others."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fault_proxy import Fault, FaultProxy, Kind

BODY = bytes(range(100))


class Echo(http.server.BaseHTTPRequestHandler):
    """GET gives BODY; PUT gives back what came, and notes it."""

    protocol_version = "HTTP/1.1"
    received: list[bytes] = []  # noqa: RUF012 - of all instances: there is one for each request

    def do_GET(self) -> None:
        self.answer(BODY)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(body)
        self.answer(body)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Host", self.headers["Host"])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def fresh(proxy: FaultProxy) -> None:
    proxy.clear()
    Echo.received.clear()


def ask(proxy: FaultProxy, method: str = "GET", *, body: bytes | None = None, seconds: float = 60) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=seconds)
    try:
        connection.request(method, "/bucket/key?x=1", body=body)
        answer = connection.getresponse()
        assert method == "HEAD" or answer.status != 200 or answer.headers["X-Host"] == f"127.0.0.1:{proxy.port}"
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_rules_every_request_passes(proxy: FaultProxy) -> None:
    proxy.requests()
    assert ask(proxy) == (200, BODY)
    assert ask(proxy, "PUT", body=b"content") == (200, b"content")
    assert proxy.requests() == [("GET", "/bucket/key?x=1", ""), ("PUT", "/bucket/key?x=1", "")]


def test_errors_come_in_bursts(proxy: FaultProxy) -> None:
    before = proxy.counts()["status 429"]
    proxy.add(Fault(kind="status", status=429, method="GET", skip=1, times=2))
    assert [ask(proxy)[0] for _ in range(5)] == [200, 429, 429, 200, 200]
    assert proxy.counts()["status 429"] - before == 2


def test_an_error_is_one_of_s3(proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="status", status=404))
    status, body = ask(proxy)
    assert status == 404
    assert b"<Code>NoSuchBucket</Code>" in body
    assert ask(proxy, "HEAD") == (404, b"")


def test_a_rule_is_for_some_requests_and_some_time(proxy: FaultProxy) -> None:
    proxy.add(
        Fault(kind="status", method="PUT"), Fault(kind="status", path="^/other"), Fault(kind="status", seconds=0.0)
    )
    assert ask(proxy) == (200, BODY)
    assert ask(proxy, "PUT", body=b"x")[0] == 503
    assert Echo.received == []


def test_a_connection_is_reset_in_mid_body(proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="reset"))
    with pytest.raises(ConnectionResetError):
        ask(proxy)


def test_a_body_ends_early(proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="truncate", times=1), Fault(kind="shorten", times=1))
    with pytest.raises(http.client.IncompleteRead, match=r"50 bytes read, 50 more expected"):
        ask(proxy)
    assert ask(proxy) == (200, BODY[:50])


def test_a_bit_is_flipped_on_either_way(proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="flip", method="GET"), Fault(kind="flip upload", method="PUT"))
    assert ask(proxy) == (200, BODY[:50] + bytes([50 ^ 1]) + BODY[51:])
    ask(proxy, "PUT", body=b"aaa")
    assert Echo.received == [b"a`a"]


@pytest.mark.parametrize("kind", ["slow", "silent"])
def test_a_silent_server_sends_nothing_in_time(proxy: FaultProxy, kind: Kind) -> None:
    proxy.add(Fault(kind=kind))
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ask(proxy, seconds=0.5)
    assert time.monotonic() - began < 60  # far below what the body would take, a byte a second or never


def test_an_upload_breaks_before_the_server_has_it(proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="reset upload"))
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", body=bytes(1 << 22))
    assert Echo.received == []


def test_an_answer_is_lost_after_the_server_did_it(proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="lose answer"))
    with pytest.raises(ConnectionError):
        ask(proxy, "PUT", body=b"done")
    assert Echo.received == [b"done"]


def test_connections_are_refused_for_a_while(proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        ask(proxy)
    proxy.accept()
    assert ask(proxy) == (200, BODY)


def test_a_server_that_is_gone_breaks_the_connection() -> None:
    with FaultProxy("http://127.0.0.1:9") as alone, pytest.raises(ConnectionError):
        ask(alone)
