"""Log-likelihoods of packed continuations, against each by itself."""

from __future__ import annotations

import pytest
import torch

from streaming_rwkv.inference.scoring import Continuation, log_likelihood, score
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7, RWKV7Config

VOCAB_SIZE = 31


@pytest.fixture(scope="module")
def model() -> RWKV7:
    network = RWKV7(RWKV7Config(vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2))
    initialize(network, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # every part does something
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def requests() -> list[Continuation]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for context, tokens in ((1, 1), (1, 5), (7, 2), (20, 1), (3, 12), (2, 2), (11, 4)):
        ids = torch.randint(VOCAB_SIZE, (context + tokens,), generator=generator).tolist()
        made.append(Continuation(context=ids[:context], tokens=ids[context:]))
    return made


@torch.no_grad()
def alone(model: RWKV7, request: Continuation) -> float:
    text = torch.tensor([[*request.context, *request.tokens]])
    logits = model(text[:, :-1])[0].log_softmax(-1)
    first = len(request.context) - 1
    return sum(float(logits[first + i, token]) for i, token in enumerate(request.tokens))


@pytest.mark.parametrize("row_tokens", [1, 16, 25, 2048])
def test_packed_scores_are_those_of_each_request_alone(row_tokens: int, model: RWKV7) -> None:
    for request, found in zip(requests(), score(model, requests(), row_tokens=row_tokens), strict=True):
        assert found.log_likelihood == pytest.approx(alone(model, request), abs=1e-4)  # float32, in other chunks


def test_a_continuation_is_greedy_if_each_token_is_the_likeliest(model: RWKV7) -> None:
    context = [5, 9, 2]
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(model(torch.tensor([[*context, *tokens]]))[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % VOCAB_SIZE]
    asked = [Continuation(context=context, tokens=end) for end in (tokens, other)]
    assert [found.is_greedy for found in score(model, asked)] == [True, False]


def test_a_whole_text_is_scored_after_its_first_token(model: RWKV7) -> None:
    text = requests()[4].context + requests()[4].tokens  # type: ignore[operator]
    expected = alone(model, Continuation(context=text[:1], tokens=text[1:]))
    assert log_likelihood(model, text) == pytest.approx(expected, abs=1e-4)
    assert log_likelihood(model, text[:1]) == 0


def test_nothing_to_score(model: RWKV7) -> None:
    assert score(model, []) == []
