"""A look before spending money: what `--dry-run` shows is what the run will do, and it leaves nothing but the cache."""

from __future__ import annotations

import contextlib
import os
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from streaming_rwkv.config import ConfigError, load_config
from streaming_rwkv.console import print_rich
from streaming_rwkv.data.loader import data_spec
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.flops import parameter_count
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.storage import open_store
from streaming_rwkv.train.__main__ import main
from streaming_rwkv.train.config import CheckpointConfig, RunConfig
from streaming_rwkv.train.memory import activation_bytes, check_network_fits, state_bytes
from streaming_rwkv.train.prepare import prepare
from streaming_rwkv.train.preview import (
    batch_table,
    checkpoint_steps,
    shown_bytes,
)

CONFIG = """
save_folder: {run}
device: cpu
data:
  path: {data}
  batch_packs: 4
  workers: 0
  stages:
    - tokens: 4000
      sources: {{web: 0.75, code: 0.25}}
    - passes: 1
      min_length: 17
model: {{hidden_size: 128, num_layers: 2}}
checkpoint: {{interval_steps: 10, keep: 2}}
"""


@pytest.fixture
def config(tmp_path, write_data_set, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 40, ("web", 17, 32): 30, ("code", 1, 16): 23})
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.format(run=tmp_path / "run", data=data))
    return file


def test_a_dry_run_shows_the_mixture_the_costs_and_a_batch(config, capsys):
    assert main([str(config), "--dry-run", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert "code   │   1-16" in out
    assert "25.00% → 2" in out  # effective: whole packs, so not to the last digit
    model = RWKV7Config(vocab_size=97, hidden_size=128, num_layers=2)
    assert f"{parameter_count(model):,} (2 layers of 128, vocabulary 97)" in out
    assert "2, each with 2 packs of a step, 2 in a microbatch" in out
    assert f"{shown_bytes(16 * parameter_count(model) // 2)} (one of 2 shards), activations" in out
    assert "2 kept" in out
    assert "Batch of step 0: 4 packs" in out
    assert re.search(r"time +│ about \d:\d\d:\d\d, at 30% of products of matrices here", out)
    assert re.search(r"disk +│ about [\d.]+ kB for the cache of shards, ", out)
    assert out.endswith("next: the same command without --dry-run\n")


def test_the_batch_shown_is_the_first_that_the_run_reads(config, capsys, monkeypatch):
    import streaming_rwkv.train.dry_run as module

    batches = []

    def recorded(*args, **kwargs):
        spec = data_spec(*args, **kwargs)
        batches.append(next(iter(spec.dataloader)))
        return spec

    monkeypatch.setattr(module, "data_spec", recorded)
    assert main([str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    tokens, targets = (batches[0][name][0].tolist() for name in ("tokens", "targets"))
    last = int(batches[0]["cu_seqlens"][1]) - 1
    assert f"0 ⟨bos⟩ → {targets[0]} 'w{targets[0]}'" in out  # id n reads 'wn'
    end = "⟨eos⟩" if targets[last] == 0 else f"'w{targets[last]}'"
    assert f"{tokens[last]} 'w{tokens[last]}' → {targets[last]} {end}" in out
    assert tokens[0] == 0
    assert f"0 … {last}" in out


def test_replicas_have_fewer_shards(config, capsys):
    assert main([str(config), "--dry-run", "--processes", "4", "parallel.replicas=2"]) == 0
    model = RWKV7Config(vocab_size=97, hidden_size=128, num_layers=2)
    shard = shown_bytes(16 * parameter_count(model) // 2)
    assert f"in float32 {shard} (one of 2 shards, 2 replicas), activations" in capsys.readouterr().out


def test_a_dry_run_leaves_nothing_but_the_cache(config, tmp_path, capsys):
    before = set(os.listdir(tmp_path))
    assert main([str(config), "--dry-run"]) == 0
    assert set(os.listdir(tmp_path)) - before == {"run"}
    assert os.listdir(tmp_path / "run") == ["cache"]
    assert main([str(config), "--dry-run"]) == 0  # and the cache is free again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "4", "parallel.replicas=3"], "parallel.replicas: found 3, but the number of processes, 4,"),
        (["--processes", "3"], "data.batch_packs: 4 packs do not divide among 3 processes"),
        (["data.path=/nowhere"], "/nowhere/manifest.json: missing"),
        (["optimizer.warmup_tokens=10_000_000"], "optimizer: warmup_tokens 10000000"),
        (["data.stages.0.sources.code=-1"], "shares must not be negative"),
        (["data.cache_limit=lots"], "data.cache_limit: found 'lots'; expected a number of bytes"),
        (["data.cache_limit=1kb"], "data.cache_limit: found 1,024 bytes, but at least"),
        (["checkpoint.allow_changed=[batch_size]"], "checkpoint.allow_changed"),
        (["data.batch_packs=1_000_000", "model.hidden_size=1024"], "data: a microbatch of 1,000,000 packs ("),
        (["save_folder=/proc/run"], "/proc/run: this save folder cannot be made or written to (No such file or"),
        (["data.cache=/dev/null/cache"], "/dev/null/cache: this data cache cannot be made or written to (Not a"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(config, capsys, arguments, message):
    assert main([str(config), "--dry-run", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["save_folder", "data.cache"])
def test_neither_a_run_nor_its_cache_is_put_into_the_data_set(config, tmp_path, capsys, setting):
    data = tmp_path / "data"
    before = set(data.rglob("*"))
    assert main([str(config), "--dry-run", f"{setting}={data / 'below'}"]) == 1
    error = capsys.readouterr().err
    assert f" would be in {data}, which is a data set; " in error
    assert setting in error
    assert set(data.rglob("*")) == before


def test_checkpoints_are_not_put_into_a_data_set_in_object_storage(config, s3_place, capsys):
    with contextlib.closing(open_store(s3_place)) as store:
        for name in ("manifest.json", "tokenizer/record.json"):
            store.put_bytes(b"{}", name)
    assert main([str(config), "--dry-run", f"save_remote={s3_place}"]) == 1
    assert (
        f"{s3_place}: this run would be in {s3_place}, which is a data set; give this run another"
        in capsys.readouterr().err
    )


def test_shards_that_are_missing_or_cut_are_found_before_the_first_step(config, tmp_path, capsys):
    web = tmp_path / "data" / "train" / "web"
    first, *others = sorted(web.rglob("*.zstd"))
    size = first.stat().st_size
    os.truncate(first, 12)
    for shard in others:
        shard.unlink()
    assert main([str(config), "--dry-run"]) == 1
    assert (
        f"{tmp_path / 'data'}: shards are not as the manifest says: train/web/1-16/shard.00000.mds.zstd (12 bytes "
        f"instead of {size:,}), train/web/1-16/shard.00001.mds.zstd (missing), train/web/1-16/shard.00002.mds.zstd "
        f"(missing) and {len(others) - 2} more; restore them, or build again; `streaming-rwkv verify"
    ) in capsys.readouterr().err


def test_shards_that_no_stage_uses_may_be_missing(config, tmp_path):
    for shard in (tmp_path / "data" / "train" / "code" / "1-16").glob("*.zstd"):
        shard.unlink()
    assert main([str(config), "--dry-run", "data.stages=[{tokens: 4000, sources: {web: 1, code: 0}}]"]) == 0
    assert main([str(config), "--dry-run"]) == 1


def test_a_microbatch_larger_than_a_process_has_packs_is_reported_as_not_used(config, capsys, caplog):
    assert main([str(config), "--dry-run", "--processes", "2", "microbatch_packs=3"]) == 0
    assert "microbatch_packs: found 3, but each of 2 processes has 2 packs of a step; using 2" in caplog.text
    assert "2, each with 2 packs of a step, 2 in a microbatch" in capsys.readouterr().out


def test_a_missing_gpu_is_refused(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in ([], ["--dry-run"]):
        assert main([str(config), "device=gpu", *more]) == 1
        assert "device: found gpu, but torch sees no CUDA device; leave it out" in capsys.readouterr().err


def test_sizes_of_checkpoints_and_memory_are_shown_with_their_units_and_device(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(config), "--dry-run", "checkpoint.interval_steps=1000", "device=null"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    size = 12 * parameter_count(RWKV7Config(vocab_size=97, hidden_size=128, num_layers=2)) / 1e6
    assert re.search(rf"1 to come, after step \d+; about {size:.1f} MB │", shown)
    assert "MB on a GPU, though none is here: device=cpu shows the CPU's; weights" in shown
    assert main([str(config), "--dry-run"]) == 0
    assert "MB on the CPU; weights" in capsys.readouterr().out


def test_begin_and_end_of_a_document_are_marked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    batch = {
        "tokens": torch.tensor([[0, 5, 6]]), "targets": torch.tensor([[5, 6, 0]]), "num_targets": 3,
        "cu_seqlens": torch.tensor([0, 3]), "pack_starts": torch.tensor([0, 3]), "streams": torch.tensor([0]),
    }  # fmt: skip
    plan = SimpleNamespace(streams=[SimpleNamespace(source="web", bucket="1-16")])
    tokenizer = SimpleNamespace(bos_id=0, eos_id=0, decode=lambda ids: "" if ids == [0] else f"w{ids[0]}")
    print_rich(batch_table(batch, plan, tokenizer, step=0))
    out = capsys.readouterr().out
    assert "0 ⟨bos⟩ → 5 'w5'" in out
    assert "6 'w6' → 0 ⟨eos⟩" in out


def test_every_setting_that_a_checkpoint_is_compared_by_can_be_allowed_to_change(config):
    run = load_config(RunConfig, str(config), overrides=["data.skip_steps=[[1, 1]]"])
    prepared = prepare(run, world_size=1, fetch=True)
    (allowed,) = get_args(CheckpointConfig.model_fields["allow_changed"].annotation)
    assert set(get_args(allowed)) == set(prepared.identity)
    prepared.shard_set.lock.release()


def test_two_numbers_of_processes_are_refused(config, capsys):
    with pytest.raises(SystemExit):
        main([str(config), "--dry-run", "processes=2", "--processes", "4"])
    assert "processes=2: --processes is 4; give one of them" in capsys.readouterr().err
    assert main([str(config), "--dry-run", "processes=2", "--processes", "2"]) == 0


def test_processes_must_be_positive(config, capsys):
    with pytest.raises(SystemExit):
        main([str(config), "--dry-run", "--processes", "0"])
    assert "--processes: found 0, expected 1 or more" in capsys.readouterr().err


def test_checkpoints_that_are_kept_are_counted(config, capsys):
    assert main([str(config), "--dry-run"]) == 0
    assert "2 kept" in capsys.readouterr().out
    assert main([str(config), "--dry-run", "checkpoint.interval_steps=5", "checkpoint.keep_every=10"]) == 0
    out = capsys.readouterr().out
    steps = int(re.search(r"│ steps +│ ([\d,]+), each of", out)[1].replace(",", ""))
    assert f"{len({*range(10, steps + 1, 10), steps, steps // 5 * 5 - 5 * (steps % 5 == 0)})} kept" in out


def test_checkpoints_are_due_at_each_interval_and_at_the_end():
    assert checkpoint_steps(steps=25, interval=10) == [10, 20, 25]
    assert checkpoint_steps(steps=30, interval=10, first=10) == [20, 30]
    assert checkpoint_steps(steps=30, interval=10, first=30) == []
    assert checkpoint_steps(steps=7, interval=10) == [7]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.hidden_size=640000000",
            r"model: [\d,]+ parameters \(2 layers of 640000000, .* \(.*memory\); make the mo",
        ),
        (
            "model.vocab_size=2147483647",
            r"model: [\d,]+ parameters \(2 layers of 128, vocabulary 2,147,483,647\) need at",
        ),
        (
            "checkpoint.interval_steps=1",
            r"checkpoint\.interval_steps: found 1, and the run has [\d,]+ steps, so [\d,]+ c",
        ),
    ],
)
def test_what_no_machine_can_hold_is_refused(setting, message, config, capsys):
    longer = ["data.stages=[{tokens: 10000M}]"] if "interval" in setting else []
    assert main([str(config), "--dry-run", "model.num_layers=2", setting, *longer]) == 1
    assert re.search(f"error: {message}", capsys.readouterr().err)


def test_a_network_must_fit_the_machine_that_trains_it():
    model = RWKV7Config(vocab_size=97, hidden_size=1 << 17, num_layers=32)  # 6.6 T parameters: 106 TB with the moments
    check_network_fits(model, shards=1024, device="gpu", is_planned=True)
    with pytest.raises(ConfigError, match=r"in each process, but there are only 1\.10 TB \(more than any GPU has\)"):
        check_network_fits(model, shards=8, device="gpu", is_planned=True)
    with pytest.raises(ConfigError, match=r"need at least 26\.\d+ TB in each process"):  # built whole on each
        check_network_fits(model, shards=1024, device="gpu", is_planned=False)


def test_weights_gradients_and_moments_are_divided_among_processes():
    model = RWKV7Config(vocab_size=97, hidden_size=128, num_layers=2)
    assert state_bytes(model, shards=1) == 16 * sum(p.numel() for p in RWKV7(model).parameters())
    assert state_bytes(model, shards=4) == state_bytes(model, shards=1) // 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_the_estimate_of_activations_is_what_autograd_keeps(precision, checkpointing):
    model = RWKV7Config(
        vocab_size=50, hidden_size=192, num_layers=6, activation_checkpointing=checkpointing, loss_chunk_tokens=32
    )
    network = RWKV7(model)
    initialize(network, seed=1)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(50, (1, 512), generator=torch.Generator().manual_seed(1))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "amp_bf16"),
    ):
        network(tokens, cu_seqlens=torch.tensor([0, 200, 512], dtype=torch.int32), targets=tokens)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    row = 512 * 192
    if checkpointing:  # a block's insides are made again during the backward pass, one at a time
        weights_in_bf16 = 2 * sum(p.numel() for p in network.blocks[1].parameters() if p.ndim == 2)
        counted += row * {"fp32": 83, "amp_bf16": 51}[precision] + weights_in_bf16 * (precision == "amp_bf16")
    estimate = activation_bytes(model, tokens=512, precision=precision, processes=1, device="cpu")
    # A figure to plan with, not to the byte: LoRA ranks and norms depend on the width in other ways.
    assert estimate == pytest.approx(counted, rel=0.1)
