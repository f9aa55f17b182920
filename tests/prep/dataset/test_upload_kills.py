"""Builds into object storage that are killed, and servers that go away under them: the same bytes, none sent twice."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from prep.build import build
from prep.config import PrepConfig
from prep.dataset.verification import verify
from streaming_rwkv.storage import Store, open_store
from tests.fault_proxy import Fault, FaultProxy
from tests.prep.processes import kill, started, wait_for
from tools.s3_server import S3Server

pytestmark = pytest.mark.slow


@pytest.fixture
def store(s3_place: str) -> Iterator[Store]:
    with contextlib.closing(open_store(s3_place, timeout_seconds=60)) as store:
        yield store


@pytest.fixture
def recipe(tmp_path: Path, write_lines: Callable[..., Path], tokenizer_folder: Path, store: Store) -> Path:
    """Some dozen shards in as many windows."""
    draw = random.Random(0)
    words = ["alpha", "beta", "床前", "明月光", "def f():\n", "0123456789"]
    for number in range(8):
        texts = ["".join(draw.choices(words, k=draw.choice([3, 30, 300]))) for _ in range(60)]
        write_lines(tmp_path / "corpus" / f"{number:02}.jsonl", texts)
    values = {
        "out": store.location,
        "work": str(tmp_path / "work"),
        "tokenizer": str(tokenizer_folder),
        "sources": {"corpus": {"paths": str(tmp_path / "corpus")}},
        "validation": 0.05,
        "unit_bytes": 1 << 14,
        "window_tokens": 1 << 13,
        "shard_bytes": 1 << 13,
        "pack_tokens": 2048,
        "workers": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def expected(recipe: Path, tmp_path: Path) -> dict[str, bytes]:
    values = yaml.safe_load(recipe.read_text()) | {"out": str(tmp_path / "local"), "work": None, "workers": 1}
    build(PrepConfig.model_validate(values))
    files = [path for path in (tmp_path / "local").rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(tmp_path / "local")): path.read_bytes() for path in files}


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, store: Store) -> Iterator[FaultProxy]:
    """Between the builds and the server; the tests look at the server itself."""
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        yield proxy


def check_whole(store: Store, expected: dict[str, bytes]) -> None:
    assert {name: store.get_bytes(name, most=1 << 24) for name in store.list()} == expected
    verify(store.location)


def sent(proxy: FaultProxy, store: Store) -> list[str]:
    """Names of the objects that were uploaded since the last call."""
    below = f"/{store.bucket}/{store.prefix}/"
    return [path.partition("?")[0].removeprefix(below) for method, path, _ in proxy.requests() if method == "PUT"]


def upload_and_kill(recipe: Path, proxy: FaultProxy, store: Store, *, objects: int) -> None:
    """Run a build that is killed when a number of objects exist and it waits for the answers of the next ones."""
    silent = proxy.counts()["silent"]
    proxy.add(Fault(kind="silent", method="PUT", skip=objects - len(store.list())))
    with started(recipe) as process:
        wait_for(lambda: proxy.counts()["silent"] > silent)
        wait_for(lambda: len(store.list()) == objects)
        kill(process)
    proxy.clear()


@pytest.mark.end_to_end
def test_a_build_killed_during_uploads_gives_the_same_bytes(recipe, expected, store, proxy, s3_server):
    assert len(expected) > 40
    there: dict[str, int] = {}
    for share in (0.1, 0.6):
        upload_and_kill(recipe, proxy, store, objects=int(share * len(expected)))
        assert not set(sent(proxy, store)) & set(there)
        there = store.list()
        assert len(there) == int(share * len(expected))
        assert "manifest.json" not in there
    with s3_server.client() as client:  # what a kill in the middle of a large shard would leave
        client.create_multipart_upload(
            Bucket=store.bucket, Key=f"{store.prefix}/train/corpus/1-256/shard.00000.mds.zstd"
        )
    with started(recipe) as process:
        assert process.wait() == 0, process.stderr.read()
    again = sent(proxy, store)
    assert not set(again) & set(there)
    assert again[-1] == "manifest.json"
    check_whole(store, expected)
    with s3_server.client() as client:
        assert "Uploads" not in client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)


@pytest.mark.alone  # the server must be back before patience ends
def test_a_build_survives_a_restart_of_the_server(recipe, expected, store, proxy, s3_server):
    proxy.add(
        Fault(kind="status", status=503, method="PUT", path="manifest"),  # no end before the kills
        Fault(kind="late", method="PUT"),
    )
    with started(recipe) as process:
        for share in (0.2, 0.6):
            wait_for(lambda share=share: len(store.list()) > share * len(expected))
            s3_server.kill()
            assert process.poll() is None
            s3_server.start()
        proxy.clear()
        assert process.wait() == 0, process.stderr.read()
    check_whole(store, expected)


def test_a_build_on_an_empty_machine_resumes_from_the_objects(recipe, expected, store, proxy, tmp_path):
    upload_and_kill(recipe, proxy, store, objects=len(expected) // 2)
    there = store.list()
    sent(proxy, store)
    values = yaml.safe_load(recipe.read_text()) | {"work": str(tmp_path / "empty")}
    build(PrepConfig.model_validate(values))
    assert not set(sent(proxy, store)) & set(there)
    check_whole(store, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(kind="status", status=403, method="PUT", skip=20), "403 AccessDenied: refused; check AWS_ACCESS_KEY_ID"),
        (Fault(kind="status", status=404, skip=50), "404 NoSuchBucket: there is no such bucket"),
    ],
)
def test_a_refusal_during_uploads_is_one_error_and_the_same_command_resumes(
    recipe, expected, store, proxy, fault, message
):
    proxy.add(fault)
    with started(recipe) as process:
        assert process.wait() == 1
        said = process.stderr.read()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert message in errors[0]
    assert "Traceback" not in said
    assert "manifest.json" not in store.list()
    proxy.clear()
    with started(recipe) as process:
        assert process.wait() == 0, process.stderr.read()
    check_whole(store, expected)


def test_random_faults_change_nothing(recipe, expected, store, proxy):
    proxy.add(
        Fault(kind="status", status=503, skip=5, times=5),
        Fault(kind="reset upload", method="PUT", skip=10, times=3),
        Fault(kind="flip upload", method="PUT", skip=10, times=3),
        Fault(kind="lose answer", method="PUT", skip=10, times=3),
        Fault(kind="truncate", method="GET", times=1),
    )
    with started(recipe) as process:
        assert process.wait() == 0, process.stderr.read()
    assert len(proxy.counts()) >= 4
    check_whole(store, expected)
