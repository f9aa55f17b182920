"""Log-likelihoods of continuations: many of them packed into one row, each a document with a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from streaming_rwkv.distributed import all_gather_object, rank, world_size
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.ops.layer_reference import IGNORED

ROW_TOKENS = 2048  # whose logits exist at once

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Tokens to score after a context of at least one token, such as bos."""

    context: Sequence[int]
    tokens: Sequence[int]

    @property
    def inputs(self) -> list[int]:
        return [*self.context, *self.tokens][:-1]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-likelihood of a continuation, and True if each of its tokens is the likeliest."""

    log_likelihood: float
    is_greedy: bool


def spread(jobs: Sequence[Job], work: Callable[[Job], Result], *, blank: Job) -> list[Result]:
    """Do each job on one of the ranks, and return all results on every rank, in order.

    All ranks call this with the same jobs, and each calls `work` equally often, as a sharded model needs: a rank that
    has a job less than others does `blank`, whose result is dropped.
    """
    ranks, own = world_size(), rank()
    results = [work(job) for job in jobs[own::ranks]]
    if own >= (len(jobs) % ranks or ranks):
        work(blank)
    shares = all_gather_object(results)
    return [shares[number % ranks][number // ranks] for number in range(len(jobs))]


def score(model: RWKV7, requests: Sequence[Continuation], *, row_tokens: int = ROW_TOKENS) -> list[Score]:
    """Return the score of each continuation, which do not depend on each other.

    All ranks call this with the same requests. The rows are those of one rank, so that the scores are too.

    Args:
        model: on any device; on a GPU matrix products are done in bf16. It may be sharded.
        row_tokens: packed at a time; a longer request is a row of its own.
    """
    rows = list(_rows([len(request.inputs) for request in requests], row_tokens))
    found = spread(
        [[requests[number] for number in row] for row in rows],
        partial(_score_row, model),
        blank=[Continuation(context=[0], tokens=[0])],
    )
    scores = {
        number: one for row, of_row in zip(rows, found, strict=True) for number, one in zip(row, of_row, strict=True)
    }
    return [scores[number] for number in range(len(requests))]


@torch.no_grad()
def _score_row(model: RWKV7, requests: Sequence[Continuation]) -> list[Score]:
    device = model.emb.weight.device
    inputs = [request.inputs for request in requests]
    bounds = torch.tensor([0, *map(len, inputs)]).cumsum(0)
    tokens = torch.tensor([token for one in inputs for token in one], device=device)
    with _precision(device):
        logits = model(tokens[None], cu_seqlens=bounds.int().to(device))[0]
    scores = []
    for place, request in enumerate(requests):
        wanted = torch.tensor(list(request.tokens), device=device)
        end = int(bounds[place + 1])
        part = logits[end - len(wanted) : end].float().log_softmax(-1)
        likelihood = part.gather(1, wanted[:, None]).double().sum().item()
        scores.append(Score(log_likelihood=likelihood, is_greedy=bool((part.argmax(-1) == wanted).all())))
    return scores


def log_likelihoods(model: RWKV7, texts: Sequence[Sequence[int]]) -> list[float]:
    """Return `log_likelihood` of each text. All ranks call this with the same texts."""
    scored = [number for number, text in enumerate(texts) if len(text) > 1]
    found = spread([texts[number] for number in scored], partial(log_likelihood, model), blank=[0, 0])
    values = dict(zip(scored, found, strict=True))
    return [values.get(number, 0.0) for number in range(len(texts))]


@torch.no_grad()
def log_likelihood(model: RWKV7, tokens: Sequence[int]) -> float:
    """Return the log-likelihood of all tokens after the first; the logits are computed in parts."""
    device = model.emb.weight.device
    text = torch.tensor([list(tokens)], device=device)
    targets = text[:, 1:] if text.shape[1] > 1 else torch.full((1, 0), IGNORED, device=device)
    if not targets.numel():
        return 0.0
    with _precision(device):
        nll: Tensor = model(text[:, :-1], targets=targets)
    return -nll.double().sum().item()


def _precision(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _rows(lengths: Sequence[int], row_tokens: int) -> Iterator[list[int]]:
    """Yield the requests of each row, the longest first, so that memory runs out at once or not at all."""
    row: list[int] = []
    filled = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if row and filled + lengths[number] > row_tokens:
            yield row
            row, filled = [], 0
        row.append(number)
        filled += lengths[number]
    if row:
        yield row
