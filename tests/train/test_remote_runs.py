"""A whole run by `composer train.py` with data and save folder in a bucket and faults in between; its machine is lost.

Another machine resumes it, and the end is that of an undisturbed run, to the last bit.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streaming_rwkv.inference import command_line
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.shards import sha256_of_file
from streaming_rwkv.storage import open_store
from streaming_rwkv.train.__main__ import main
from tests.fault_proxy import Fault, FaultProxy
from tests.fork_server import ForkServer
from tests.train.test_runs import (
    FREEZE,
    SETTINGS,
    TRAIN,
    VALIDATION,
    Workplace,
    assert_same_run,
    checkpoints,
    last_weights,
    newest_step,
)
from tools.s3_server import SECRET_KEY, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAULTS = [
    Fault(kind="status", status=503, chance=0.05),
    Fault(kind="reset", method="GET", chance=0.03),
    # Once each: an object that comes damaged twice in a row is an error.
    *(
        Fault(kind="flip", method="GET", path=name, times=1)
        for name in ("manifest", r"index\.json", "mds", r"\.metadata", "distcp", "complete", "metrics")
    ),
    Fault(kind="flip upload", method="PUT", chance=0.03),
    Fault(kind="lose answer", method="PUT", chance=0.03),
]


def content_of(store_location: str) -> dict[str, bytes]:
    store = open_store(store_location)
    content = {name: store.get_bytes(name, most=1 << 30) for name in store.list()}
    store.close()
    return content


def test_a_run_whose_machine_is_lost_resumes_from_the_bucket_alone(
    write_data_set: Callable[..., Path],
    s3_server: S3Server,
    s3_place: str,
    programs: ForkServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FREEZE)
    data = write_data_set(tmp_path / "data", TRAIN, validation=VALIDATION, packs_per_shard=4)
    place = Workplace(data=data, folder=tmp_path, programs=programs)
    status, output = place.train(tmp_path / "quiet")
    assert status == 0, output

    store = open_store(f"{s3_place}/data")
    for path in sorted(data.rglob("*")):
        if path.is_file():
            store.put_file(path, path.relative_to(data).as_posix(), sha256=sha256_of_file(path))
    store.close()
    run = tmp_path / "run"
    remote = [
        f"data.path={s3_place}/data", f"save_remote={s3_place}/run", "data.cache_limit=30kb", "checkpoint.keep=2",
        "log.tensorboard=true",
    ]  # fmt: skip
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        proxy.add(*FAULTS)
        with place.run(run, *remote, freeze_at=".step-00000018.tmp/.complete.json.tmp:1") as first:
            first.wait_until_frozen()
            assert newest_step(run) == 12
            first.kill_all()
            output = first.log.read_text()
        shutil.rmtree(run)  # and with it the cache
        status, resumed = place.train(run, *remote)
        assert status == 0, resumed
        assert "step-00000012" in resumed
        assert sum(proxy.counts().values()) > 0
    assert checkpoints(run) == ["step-00000024", "step-00000030"]
    assert_same_run(run, tmp_path / "quiet")

    monkeypatch.setenv("S3_ENDPOINT_URL", s3_server.endpoint)
    there = content_of(f"{s3_place}/run")
    assert json.loads(there.pop("writer.json"))["host"] == socket.gethostname()
    here = {name: run / name for name in there}
    assert [name for name, path in here.items() if there[name] != path.read_bytes()] == []
    names = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert names == {"step-00000024", "step-00000030"}
    assert {name.split("/")[0] for name in there} == {
        "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard", "tokenizer"
    }  # fmt: skip

    assert command_line.export([f"{s3_place}/run", str(tmp_path / "model.pth"), "--dtype", "float32"]) == 0
    exported, expected = read_state(tmp_path / "model.pth"), last_weights(tmp_path / "quiet")
    assert all(torch.equal(exported[name], expected[name].squeeze()) for name in ("emb.weight", "head.weight"))

    # A look from another machine: the bucket says how far the run came, and what it started from is not needed.
    empty = [f"save_folder={tmp_path / 'empty'}", "model.hidden_size=null", "model.init_from=/gone.pth"]
    assert main(["yamls/tiny_cpu.yaml", "--dry-run", *remote, *SETTINGS, *empty]) == 0
    assert "this run is finished (30 steps)" in capsys.readouterr().out

    secret = SECRET_KEY.encode()
    assert secret not in output.encode() + resumed.encode()
    assert [name for name, content in there.items() if secret in content] == []
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "s3" not in path.relative_to(tmp_path).parts]
    assert [path for path in written if secret in path.read_bytes()] == []
