"""Log-likelihoods of packed requests, against another's logits of each by itself."""

from __future__ import annotations

from typing import Any

import pytest

from streaming_rwkv.inference.scoring import Continuation, score


@pytest.mark.slow
def test_packed_log_likelihoods_are_those_of_rwkv7_hf(oracles: Any) -> None:
    """Every part of the text after every context, in rows of many requests."""
    tokens, logits = oracles.tokens, oracles.logits["rwkv7_hf"].log_softmax(-1)
    parts = [(first, end) for end in range(2, len(tokens) + 1) for first in range(1, end)]
    requests = [Continuation(context=tokens[:first], tokens=tokens[first:end]) for first, end in parts]
    for row_tokens in (40, 2048):
        found = [one.log_likelihood for one in score(oracles.model, requests, row_tokens=row_tokens)]
        expected = [sum(float(logits[i - 1, tokens[i]]) for i in range(first, end)) for first, end in parts]
        assert found == pytest.approx(expected, abs=1e-4)  # float32 sums in other orders
        assert max(expected) - min(expected) > 10
