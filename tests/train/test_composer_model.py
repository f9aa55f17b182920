"""The loss of a step is the mean over its targets, however it is cut into microbatches and ranks."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streaming_rwkv.data.batch import Batch, blank_pack, collate, count_tokens, split_batch
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config
from streaming_rwkv.train.composer_model import LossByStream, RWKV7ForTraining, add_by_stream
from tests.fork_server import ForkServer

VOCAB_SIZE = 23


def new_model() -> RWKV7ForTraining:
    network = RWKV7(RWKV7Config(vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # every weight random, so that every gradient is some number
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return RWKV7ForTraining(network, num_streams=2, flops_per_token=1)


def pack(lengths: list[int], *, stream: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, VOCAB_SIZE, sum(lengths)).astype(np.uint16),
        "lengths": np.array(lengths, np.uint32),
        "bytes": np.array([3 * (length - 1) for length in lengths], np.uint32),
        "stream": stream,
    }


def step_batch() -> Batch:
    """Packs of 13, 5, 9, no and 2 targets."""
    packs = [pack([4, 11], stream=0, seed=1), pack([6], stream=1, seed=2), pack([3, 3, 6], stream=0, seed=3)]
    return collate([*packs, blank_pack(0, np.uint16), pack([3], stream=1, seed=4)])


def one_step(model: RWKV7ForTraining, microbatches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient as Composer accumulates them: each microbatch's loss times its share of the targets."""
    model.zero_grad()
    counts = [count_tokens(microbatch)["loss_generating"] for microbatch in microbatches]
    total = 0.0
    for count, microbatch in zip(counts, microbatches, strict=True):
        loss = model.loss(model(microbatch), microbatch) * (count / sum(counts))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("microbatch_packs", [1, 2, 3, 4])
def test_loss_and_gradient_do_not_depend_on_microbatches(microbatch_packs: int) -> None:
    model, batch = new_model(), step_batch()
    whole, gradients = one_step(model, [batch])
    microbatches = split_batch(batch, microbatch_packs)
    assert len(microbatches) == -(-5 // microbatch_packs)
    loss, split_gradients = one_step(model, microbatches)
    assert loss == pytest.approx(whole, rel=1e-12)
    assert gradients.keys() == split_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_loss_is_the_plain_mean_of_cross_entropy() -> None:
    """Mean of torch's own loss over the logits of each piece alone."""
    model, batch = new_model(), step_batch()
    bounds = batch["cu_seqlens"].tolist()
    summed = torch.zeros((), dtype=torch.float64)
    for low, high in itertools.pairwise(bounds):
        tokens, targets = batch["tokens"][:, low:high], batch["targets"][0, low:high]
        logits = model.network(tokens, cu_seqlens=torch.tensor([0, high - low], dtype=torch.int32))
        summed += torch.nn.functional.cross_entropy(logits[0], targets, ignore_index=-100, reduction="sum")
    assert batch["num_targets"] == 13 + 5 + 9 + 2
    loss = model.loss(model(batch), batch)
    assert loss.item() == pytest.approx(summed.item() / 29, rel=1e-9)


def test_a_microbatch_without_targets_has_loss_and_gradient_0() -> None:
    model = new_model()
    blank = split_batch(step_batch(), 1)[3]
    assert blank["num_targets"] == 0
    loss = model.loss(model(blank), blank)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_losses_of_packs_are_the_sums_of_their_targets() -> None:
    model, batch = new_model(), step_batch()
    outputs = model(batch)
    nll = outputs["nll"][0].detach()
    expected = [nll[:13].sum(), nll[13:18].sum(), nll[18:27].sum(), torch.zeros(()), nll[28:].sum()]
    assert outputs["pack_nll"].tolist() == pytest.approx([float(value) for value in expected], abs=1e-9)


@pytest.mark.parametrize("microbatch_packs", [1, 2, 5])
def test_validation_losses_by_stream_do_not_depend_on_batches(microbatch_packs: int) -> None:
    model, batch = new_model(), step_batch()
    metric = model.get_metrics(is_train=False)["loss"]
    assert isinstance(metric, LossByStream)
    with torch.no_grad():
        nll = model(batch)["pack_nll"].tolist()
        for microbatch in split_batch(batch, microbatch_packs):
            model.update_metric(microbatch, model.eval_forward(microbatch), metric)
    assert metric.compute().item() == pytest.approx(sum(nll) / 29)
    assert metric.totals["nll"] == pytest.approx([nll[0] + nll[2], nll[1] + nll[4]])
    assert metric.totals["targets"] == [13 + 9, 5 + 2]
    assert metric.totals["text_bytes"] == [3 * 22, 3 * 7]


def test_composer_computes_no_metrics_of_its_own_in_training() -> None:
    assert new_model().get_metrics(is_train=True) == {}


@pytest.mark.timeout(300)
def test_sharding_does_not_change_what_is_computed_in_bf16(programs: ForkServer) -> None:
    """Composer's own setting rounds the residual stream and the states to bf16; then no texts could be sampled."""
    worker = Path(__file__).with_name("sharding_worker.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1",
        str(worker),
    ]  # fmt: skip
    done = programs.run(command, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "sharding_worker.py equal"


def test_sums_by_stream_leave_out_blank_packs() -> None:
    sums = torch.zeros(3, dtype=torch.float64)
    add_by_stream(sums, torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, -1, 2]))
    assert sums.tolist() == [2, 0, 9]
    add_by_stream(sums, torch.tensor([16.0, math.nan]), torch.tensor([1, -1]))
    assert sums.tolist() == [2, 16, 9]
