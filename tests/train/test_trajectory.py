"""Sixty steps of training against a straight-line PyTorch implementation of the reference trainer.

Everything in `Reference` is written from RWKV-LM's train_temp and the RWKV-7 paper, one token at a time, and uses
nothing of the package: forward pass, loss, L2Wrap, AdamW with its groups, clipping, learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import read_model
from streaming_rwkv.train.config import OptimizerConfig
from streaming_rwkv.train.optimizer import build_optimizer, lr_multiplier

STEPS, ROWS, TOKENS, VOCABULARY, WIDTH, LAYERS, HEADS, N = 60, 4, 16, 256, 128, 2, 2, 64
LR, LR_FINAL, WARM_UP_STEPS, WEIGHT_DECAY, CLIP = 1e-3, 1e-4, 10, 0.1, 1.0


class Reference:
    """The model as a flat dict of weights, and the optimizer's moments."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        weights = torch.load(path, weights_only=True)
        self.weights = {
            name: value.to(dtype).requires_grad_()
            for name, value in weights.items()
            if name not in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
        }
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}

    def logits(self, tokens: Tensor) -> Tensor:
        z = self.weights
        rows, length = tokens.shape

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, (WIDTH,), z[name + ".weight"], z[name + ".bias"], 1e-5)

        def shift(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

        x = norm(z["emb.weight"][tokens], "blocks.0.ln0")
        v_first = x
        for layer in range(LAYERS):
            block = f"blocks.{layer}."
            att = block + "att."
            u = norm(x, block + "ln1")
            xx = shift(u) - u
            xr, xw, xk, xv, xa, xg = (u + xx * z[att + "x_" + letter] for letter in "rwkvag")
            r = xr @ z[att + "receptance.weight"].T
            w = z[att + "w0"] + torch.tanh(xw @ z[att + "w1"]) @ z[att + "w2"]
            w = -F.softplus(-w) - 0.5
            k = xk @ z[att + "key.weight"].T
            v = xv @ z[att + "value.weight"].T
            if layer == 0:
                v_first = v
            else:
                v = v + (v_first - v) * torch.sigmoid(z[att + "v0"] + (xv @ z[att + "v1"]) @ z[att + "v2"])
            a = torch.sigmoid(z[att + "a0"] + (xa @ z[att + "a1"]) @ z[att + "a2"])
            g = torch.sigmoid(xg @ z[att + "g1"]) @ z[att + "g2"]
            kk = F.normalize((k * z[att + "k_k"]).view(rows, length, HEADS, N), dim=-1, p=2.0).view(rows, length, WIDTH)
            k = k * (1 + (a - 1) * z[att + "k_a"])

            def heads(q: Tensor) -> Tensor:
                return q.view(rows, length, HEADS, N)

            state = torch.zeros(rows, HEADS, N, N, dtype=x.dtype)
            outputs = []
            decay, rh, kh, vh, ah, bh = map(heads, (torch.exp(-torch.exp(w)), r, k, v, -kk, kk * a))
            for t in range(length):
                vk = vh[:, t].unsqueeze(-1) @ kh[:, t].unsqueeze(-2)
                ab = ah[:, t].unsqueeze(-1) @ bh[:, t].unsqueeze(-2)
                state = state * decay[:, t].unsqueeze(-2) + state @ ab + vk
                outputs.append((state @ rh[:, t].unsqueeze(-1)).squeeze(-1))
            y = torch.stack(outputs, dim=1).reshape(rows * length, WIDTH)
            y = F.group_norm(y, HEADS, z[att + "ln_x.weight"], z[att + "ln_x.bias"], 64e-5).view(rows, length, WIDTH)
            y = y + ((rh * kh * z[att + "r_k"]).sum(dim=-1, keepdim=True) * vh).view(rows, length, WIDTH)
            x = x + (y * g) @ z[att + "output.weight"].T

            ffn = block + "ffn."
            u = norm(x, block + "ln2")
            hidden = torch.relu((u + (shift(u) - u) * z[ffn + "x_k"]) @ z[ffn + "key.weight"].T) ** 2
            x = x + hidden @ z[ffn + "value.weight"].T
        return norm(x, "ln_out") @ z["head.weight"].T

    def step(self, number: int, tokens: Tensor, targets: Tensor) -> float:
        """One optimizer step, the first being number 0; returns the loss before it."""
        logits = self.logits(tokens)
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))
        largest, index = logits.detach().max(-1, keepdim=True)
        wrap = torch.zeros_like(logits).scatter_(-1, index, largest * 1e-4 / targets.numel())
        names = list(self.weights)
        with torch.enable_grad():
            surrogate = loss + (logits * wrap).sum()  # adds `wrap` to the gradient of the logits
        gradients = dict(zip(names, torch.autograd.grad(surrogate, list(self.weights.values())), strict=True))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        clip = min(1.0, CLIP / (norm.item() + 1e-6))

        progress = min(1.0, max(0.0, (number - WARM_UP_STEPS) / (STEPS - WARM_UP_STEPS)))
        final = LR_FINAL / LR
        lr = LR * ((0.5 + final / 2) + (0.5 - final / 2) * math.cos(math.pi * progress))
        if number < WARM_UP_STEPS:
            lr = lr * (0.01 + 0.99 * number / WARM_UP_STEPS)
        beta1, beta2, eps, t = 0.9, 0.99, 1e-18, number + 1
        with torch.no_grad():
            for name, weight in self.weights.items():
                gradient = gradients[name] * clip
                rate = 2 * lr if "att.w0" in name else lr
                if ".weight" in name and len(weight.squeeze().shape) >= 2:
                    weight.mul_(1 - rate * WEIGHT_DECAY)
                self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
                self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
                unbiased = self.first[name] / (1 - beta1**t)
                weight.sub_(rate * unbiased / (torch.sqrt(self.second[name] / (1 - beta2**t)) + eps))
        return loss.item()


def first_weights(path: Path) -> None:
    """A fixed `.pth` in BlinkDL's form whose every weight is random, and so every gradient is not 0.

    They are small: from weights twice as large the trajectory is chaotic, and two float32 runs that round in another
    order part by 1e-4 within 60 steps.
    """
    generator = torch.Generator().manual_seed(7)
    vector, ranks = (1, 1, WIDTH), {"w": 32, "a": 32, "v": 16, "g": 64}
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (VOCABULARY, WIDTH), "head.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        shapes |= {att + f"x_{letter}": vector for letter in "rwkvag"}
        shapes |= {att + f"{letter}0": vector for letter in "wav"}
        shapes |= {att + f"{letter}1": (WIDTH, rank) for letter, rank in ranks.items()}
        shapes |= {att + f"{letter}2": (rank, WIDTH) for letter, rank in ranks.items()}
        shapes |= {att + "k_k": vector, att + "k_a": vector, att + "r_k": (HEADS, N), ffn + "x_k": vector}
        shapes |= {att + f"{name}.weight": (WIDTH, WIDTH) for name in ("receptance", "key", "value", "output")}
        shapes |= {ffn + "key.weight": (4 * WIDTH, WIDTH), ffn + "value.weight": (WIDTH, 4 * WIDTH)}
    weights = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = ["ln_out", "blocks.0.ln0"]
    norms += [f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in ("ln1", "ln2", "att.ln_x")]
    for name in norms:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
    for layer in range(LAYERS):
        weights[f"blocks.{layer}.att.k_k"] += 0.7
        weights[f"blocks.{layer}.att.k_a"] += 1.0
    torch.save(weights, path)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Bytes that have something to learn: rows that count upwards, each in its own stride, with some noise."""
    generator = torch.Generator().manual_seed(11)
    result = []
    for _ in range(STEPS):
        start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
        stride = torch.randint(1, 4, (ROWS, 1), generator=generator)
        row = (start + stride * torch.arange(TOKENS + 1)) % VOCABULARY
        noise = torch.randint(VOCABULARY, row.shape, generator=generator)
        row = torch.where(torch.rand(row.shape, generator=generator) < 0.05, noise, row)
        result.append((row[:, :-1], row[:, 1:]))
    return result


def our_losses(model: RWKV7) -> list[float]:
    """The package's pieces as training puts them together: packed documents, two microbatches a step."""
    tokens_per_step = ROWS * TOKENS
    config = OptimizerConfig(
        lr=LR, lr_final=LR_FINAL, weight_decay=WEIGHT_DECAY, warmup_tokens=WARM_UP_STEPS * tokens_per_step
    )
    optimizer = build_optimizer(model, config)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for number, (tokens, targets) in enumerate(batches()):
        optimizer.zero_grad()
        loss = 0.0
        for rows in (slice(0, 1), slice(1, ROWS)):
            packed = tokens[rows].reshape(1, -1)
            bounds = torch.arange(0, packed.shape[1] + 1, TOKENS, dtype=torch.int32)
            nll = model(packed, cu_seqlens=bounds, targets=targets[rows].reshape(1, -1))
            share = nll.sum() / tokens_per_step
            share.backward()
            loss += share.item()
        losses.append(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        multiplier = lr_multiplier(config, tokens_seen=number * tokens_per_step, total_tokens=STEPS * tokens_per_step)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * multiplier
        optimizer.step()
    return losses


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_sixty_steps_equal_the_reference_trainers(tmp_path: Path) -> None:
    first_weights(tmp_path / "first.pth")
    reference = Reference(tmp_path / "first.pth", torch.float64)
    expected = [reference.step(number, *batch) for number, batch in enumerate(batches())]
    assert expected[-1] < expected[0] - 1  # it did learn

    def distance(model: RWKV7) -> float:
        return max(abs(a - b) for a, b in zip(our_losses(model), expected, strict=True))

    model = read_model(tmp_path / "first.pth", dtype=torch.float64)
    assert distance(model) < 1e-9
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.weights[name], rtol=0, atol=1e-8, msg=name)
    # In float32 single weights differ more than the loss does: with eps 1e-18 a step of AdamW is as large for a
    # gradient that is rounding noise as for any other.
    assert distance(read_model(tmp_path / "first.pth", dtype=torch.float32)) < 1e-5
