"""Data sets in object storage have the bytes of a local build, and are complete or invisible after any fault."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prep.__main__ import main
from prep.build import build
from prep.config import PrepConfig
from prep.dataset.upload import upload
from prep.dataset.verification import verify
from prep.execution.observer import Observer
from prep.execution.task_store import WorkError
from streaming_rwkv.config import ConfigError, UserError, validate
from streaming_rwkv.shards import SPLITS, DataError
from streaming_rwkv.storage import StorageError, Store, open_store
from tests.fault_proxy import Fault, FaultProxy
from tests.prep.processes import wait_for
from tools.s3_server import S3Server


@pytest.fixture
def store(s3_place: str) -> Iterator[Store]:
    with contextlib.closing(open_store(s3_place, timeout_seconds=20)) as store:
        yield store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        texts = [" ".join(draw.choices(["alpha", "beta", "床前"], k=draw.choice([3, 30, 300]))) for _ in range(20)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def recipe(corpus: Path, tokenizer_folder: Path) -> Callable[..., PrepConfig]:
    def make(**values: object) -> PrepConfig:
        values = {
            "tokenizer": str(tokenizer_folder),
            "sources": {"corpus": {"paths": str(corpus)}},
            "workers": 1,
            "unit_bytes": 1 << 13,
            "window_tokens": 1 << 12,
            "shard_bytes": 1 << 13,
            "edges": [32, 256],
            "validation": 0.1,
            **values,
        }
        return validate(PrepConfig, values, where="test")

    return make


@pytest.fixture(scope="module")
def local(recipe: Callable[..., PrepConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set in a folder. Tests that change it take a copy."""
    out = tmp_path_factory.mktemp("local") / "set"
    build(recipe(out=str(out)))
    return out


@pytest.fixture
def remote(recipe: Callable[..., PrepConfig], s3_place: str, tmp_path: Path) -> Callable[..., PrepConfig]:
    return lambda **values: recipe(**{"out": s3_place, "work": str(tmp_path / "work"), **values})


def files_of(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and ".prep" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def objects_of(store: Store) -> dict[str, bytes]:
    return {name: store.get_bytes(name, most=1 << 24) for name in store.list()}


def name_of(path: str, store: Store) -> str:
    return path.partition("?")[0].removeprefix(f"/{store.bucket}/{store.prefix}/")


# --- a finished build ---


def test_a_build_into_a_bucket_gives_the_bytes_of_a_local_one(remote, local, store, tmp_path):
    built = build(remote())
    assert not built.was_finished
    assert objects_of(store) == files_of(local)
    assert sum(len(stream.shards) for stream in built.manifest.streams) > 10
    # The work folder keeps the state of the build only.
    assert {path.name for path in (tmp_path / "work").rglob("*") if path.is_file()} == {".lock", "state.json"}
    assert build(remote()).was_finished
    assert verify(store.location) == built.manifest


def test_shards_are_uploaded_first_and_the_manifest_last(remote, store, s3_server, monkeypatch):
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        build(remote())
        names = [name_of(path, store) for method, path, _ in proxy.requests() if method == "PUT"]

    def kind(name: str) -> int:
        if name == "manifest.json":
            return 3
        return 2 if name.endswith("index.json") else 0 if ".mds." in name else 1

    assert [kind(name) for name in names] == sorted(kind(name) for name in names)
    assert set(Counter(names).values()) == {1}
    assert sorted(names) == sorted(store.list())


class Windows(Observer):
    """Counts the packed windows, and calls a function when a number of them is packed and the next is not begun."""

    def __init__(self, number: int = 0, function: Callable[[], None] = lambda: None) -> None:
        self.number, self.function = number, function
        self.is_packing, self.packed = False, 0

    def step(self, name, *, totals, in_bytes=False):
        self.is_packing = name == "packing"

    def done(self, source, amount):
        if self.is_packing:
            self.packed += 1
            if self.packed == self.number:
                self.function()


def test_shards_are_uploaded_while_later_windows_are_packed(remote, recipe, store, tmp_path):
    def uploaded() -> int:
        return len([name for name in store.list() if ".mds." in name])

    whole, seen = Windows(), []
    build(recipe(out=str(tmp_path / "counted")), observer=whole)
    assert whole.packed > 1
    build(remote(), observer=Windows(whole.packed - 1, lambda: seen.append(wait_for(uploaded))))
    assert 0 < seen[0] < uploaded()


def test_two_workers_give_the_same_bytes(remote, local, store):
    build(remote(workers=2))
    assert objects_of(store) == files_of(local)


def test_a_finished_data_set_is_known_without_its_work_folder(remote, store, tmp_path):
    manifest = build(remote()).manifest
    again = build(remote(work=str(tmp_path / "empty")))
    assert again.was_finished
    assert again.manifest == manifest


def test_the_work_folder_is_in_the_cache_by_default(recipe, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert recipe(out="s3://bucket/a/b").folder == Path("/cache/streaming-rwkv/prep/bucket%2Fa%2Fb")
    with pytest.raises(
        ConfigError, match=r"work: found '/x' with out=/y; expected a local folder, and only with out=s3"
    ):
        recipe(out="/y", work="/x")


# --- refusals ---


def test_another_data_set_in_the_same_place_is_refused(remote, store, tmp_path):
    build(remote())
    before = objects_of(store)
    with pytest.raises(
        WorkError, match=r"s3://.*: holds a finished data set.*\n  config.pack_tokens: was 8192, is 4096"
    ):
        build(remote(pack_tokens=4096, work=str(tmp_path / "other")))
    assert objects_of(store) == before


def test_another_remote_data_set_is_refused_even_with_work_of_this_recipe(remote, store, tmp_path):
    class Killed(Observer):
        def step(self, name, *, totals, in_bytes=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(remote(), observer=Killed())
    build(remote(pack_tokens=4096, work=str(tmp_path / "other")))
    before = objects_of(store)
    with pytest.raises(WorkError, match=r"holds a finished data set.*\n  config.pack_tokens: was 4096, is 8192"):
        build(remote())
    assert objects_of(store) == before


def test_a_local_data_set_is_refused_as_work_folder(remote, recipe, tmp_path):
    build(recipe(out=str(tmp_path / "mine")))
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(WorkError, match=r"mine: holds a finished data set of its own; choose an empty `work=`"):
        build(remote(work=str(tmp_path / "mine")))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["thesis.pdf", "tokenizer/llama.model"])
def test_other_objects_are_left_alone(remote, store, name):
    store.put_bytes(b"mine", name)
    with pytest.raises(WorkError, match=rf"s3://.*: holds other objects \({name}\); choose a location without objects"):
        build(remote())
    assert list(store.list()) == [name]


def test_a_data_set_inside_another_is_refused(remote, local, store):
    upload(local, store.location)
    before = objects_of(store)
    message = rf"this data set would be in {store.location}, which is a data set; choose a location of its own"
    with pytest.raises(UserError, match=message):
        upload(local, f"{store.location}/other")
    with pytest.raises(UserError, match=message):
        build(remote(out=f"{store.location}/other"))
    assert objects_of(store) == before


def test_a_missing_bucket_is_noticed_before_the_work(remote, tmp_path):
    with pytest.raises(StorageError, match="NoSuchBucket: there is no such bucket"):
        build(remote(out="s3://no-such-bucket/x"))
    assert not (tmp_path / "work" / ".prep" / "done").exists()


def test_wrong_credentials_are_noticed_before_the_work(remote, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageError, match="403 SignatureDoesNotMatch: refused; check AWS_ACCESS_KEY_ID"):
        build(remote())
    assert not (tmp_path / "work" / ".prep" / "done").exists()


def test_objects_of_an_unfinished_build_with_other_settings_are_removed(remote, local, store, tmp_path):
    store.put_bytes(b"another build's", "train/corpus/1-32/shard.00999.mds.zstd")
    store.put_bytes(b"another build's", "train/corpus/1-32/shard.00000.mds.zstd")
    build(remote())
    assert objects_of(store) == files_of(local)


# --- upload ---


def test_a_local_data_set_is_uploaded(local, store, capsys):
    assert main(["upload", str(local), store.location]) == 0
    assert objects_of(store) == files_of(local)
    assert main(["upload", str(local), store.location]) == 0
    assert "already uploaded, nothing to do" in capsys.readouterr().out
    assert main(["verify", store.location]) == 0
    assert "OK; " in capsys.readouterr().out


def test_a_damaged_data_set_is_not_uploaded(local, store, tmp_path):
    damaged = shutil.copytree(local, tmp_path / "damaged")
    shard = next(damaged.rglob("*.zstd"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=f"{shard.name}: sha256 .*, the manifest says"):
        upload(damaged, store.location)
    assert store.list() == {}


@pytest.mark.parametrize(
    "name",
    ["rejected.jsonl", "statistics.json", "manifest.json", "tokenizer/README", "tokenizer/record.json", "notes"],
)
def test_a_link_is_not_followed_by_an_upload(local, store, tmp_path, name):
    (tmp_path / "secret").write_text("a secret")
    received = shutil.copytree(local, tmp_path / "received")
    (received / name).unlink(missing_ok=True)
    (received / name).symlink_to(tmp_path / "secret")
    with pytest.raises(WorkError) as raised:
        upload(received, store.location)
    assert str(raised.value).startswith(f"{received}/{name}: is a symbolic link; an upload sends regular files")
    assert store.list() == {}


def test_a_linked_folder_and_a_pipe_are_not_uploaded(local, store, tmp_path):
    received = shutil.copytree(local, tmp_path / "received")
    (received / "tokenizer").rename(tmp_path / "elsewhere")
    (received / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkError, match="received/tokenizer: is a symbolic link"):
        upload(received, store.location)
    (received / "tokenizer").unlink()
    (tmp_path / "elsewhere").rename(received / "tokenizer")
    (received / "rejected.jsonl").unlink()
    os.mkfifo(received / "rejected.jsonl")
    with pytest.raises(WorkError, match=r"rejected.jsonl: is not a regular file"):
        upload(received, store.location)
    assert store.list() == {}


@pytest.mark.parametrize("name", ["thesis.pdf", "tokenizer/id_rsa", "train/corpus/1-32/notes.txt"])
def test_unexpected_files_are_not_uploaded(local, store, tmp_path, name):
    received = shutil.copytree(local, tmp_path / "received")
    (received / name).write_text("mine")
    with pytest.raises(WorkError, match=rf"holds files that do not belong to a data set \({name}\); move them away"):
        upload(received, store.location)
    assert store.list() == {}


def test_report_pages_and_hidden_files_are_not_uploaded(local, store, tmp_path):
    received = shutil.copytree(local, tmp_path / "received")
    for name in ("report.html", "report.json", ".DS_Store", "tokenizer/.DS_Store"):
        (received / name).write_text("mine")
    upload(received, store.location)
    assert objects_of(store) == files_of(local)


def test_another_data_set_is_not_overwritten_by_an_upload(local, store, recipe, tmp_path):
    upload(local, store.location)
    build(recipe(out=str(tmp_path / "other"), seed=5))
    with pytest.raises(WorkError, match=r"holds another data set, with fingerprint \w{16}, not \w{16}; choose another"):
        upload(tmp_path / "other", store.location)
    assert objects_of(store) == files_of(local)


def test_a_resumed_upload_sends_no_object_twice(local, store, s3_server, monkeypatch):
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        proxy.add(Fault(kind="status", status=403, method="PUT", skip=7))
        with pytest.raises(StorageError, match="403"):
            upload(local, store.location)
        first = Counter(
            name_of(path, store) for method, path, fault in proxy.requests() if method == "PUT" and not fault
        )
        assert len(first) == 7
        assert "manifest.json" not in store.list()
        proxy.clear()
        upload(local, store.location)
        second = Counter(name_of(path, store) for method, path, _ in proxy.requests() if method == "PUT")
    assert not first & second
    assert objects_of(store) == files_of(local)


# --- reading it there ---


def damage(server: S3Server, store: Store, name: str) -> None:
    """Flip one bit of an object; its size and the writer's checksum stay."""
    content = bytearray(store.get_bytes(name, most=1 << 24))
    content[len(content) // 2] ^= 1
    with server.client() as client:
        key = {"Bucket": store.bucket, "Key": f"{store.prefix}/{name}"}
        client.put_object(**key, Body=bytes(content), Metadata=client.head_object(**key)["Metadata"])


def test_verify_finds_damaged_and_missing_objects(local, store, s3_server):
    upload(local, store.location)
    shard = next(name for name in store.list() if name.endswith(".zstd"))
    damage(s3_server, store, shard)
    with pytest.raises(StorageError, match=f"{shard}: fetched twice, and its checksum"):
        verify(store.location)
    store.delete([shard])
    with pytest.raises(DataError, match=f"{shard}: missing; the manifest names it"):
        verify(store.location)
    store.delete(["manifest.json"])
    with pytest.raises(DataError, match=r"manifest.json: no manifest, so no finished data set here"):
        verify(store.location)


def test_verify_keeps_few_shards_on_the_disk(local, store, monkeypatch, tmp_path):
    upload(local, store.location)
    fetched, most, original = [], 0, Store.get_file

    def watching(self, name, path, **values):
        nonlocal most
        fetched.append(name)
        most = max(most, len([file for file in path.parent.iterdir() if file.is_file()]))
        original(self, name, path, **values)

    monkeypatch.setattr(Store, "get_file", watching)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verify(store.location)
    assert sorted(fetched) == sorted(name for name in store.list() if name.startswith(("tokenizer/", *SPLITS)))
    assert most <= 2 * 9
    assert not list(tmp_path.glob("prep-*"))


def test_inspect_and_report_read_a_remote_data_set(local, store, capsys, tmp_path):
    upload(local, store.location)
    assert main(["inspect", str(local), "--count", "3"]) == 0
    shown = capsys.readouterr().out
    assert main(["inspect", store.location, "--count", "3"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["report", str(local), "--to", str(tmp_path / "a")]) == 0
    assert main(["report", store.location, "--to", str(tmp_path / "b")]) == 0
    of_local, of_remote = (json.loads((tmp_path / name / "report.json").read_bytes()) for name in ("a", "b"))
    assert of_local.pop("location") == str(local)
    assert of_remote.pop("location") == store.location
    assert of_local == of_remote
    assert main(["report", store.location]) == 1
    assert "name a local folder with `--to FOLDER`" in capsys.readouterr().err
