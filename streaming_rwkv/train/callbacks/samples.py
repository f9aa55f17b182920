"""Completions of fixed prompts at each evaluation.

The recurrent form is used, so a token costs the same however long the text is. Each prompt has its own random numbers,
the same at every evaluation, so that only the model changes between evaluations. The random numbers of training are
not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger, TensorboardLogger
from torch.distributed.fsdp import register_fsdp_forward_method

from streaming_rwkv.distributed import broadcast_object, is_rank_zero
from streaming_rwkv.filesystem import append_to
from streaming_rwkv.inference.sampling import generate_tokens
from streaming_rwkv.model.sharding import release_weights
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.callbacks.json_lines import forget_lines_after
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import EvaluationConfig

SHOWN_CHARACTERS = 240  # on the console; the whole text is in samples.jsonl


class Samples(Callback):
    """Complete each prompt, and write one line per prompt: {"step", "prompt", "text"}."""

    def __init__(self, path: Path, config: EvaluationConfig, *, tokenizer_folder: Path, seed: int) -> None:
        """Configure the callback; nothing is read yet.

        Args:
            tokenizer_folder: read on rank 0, and only if there are prompts.
        """
        self.path = path
        self.config = config
        self.tokenizer_folder = tokenizer_folder
        self.seed = seed
        self.tokenizer: Tokenizer | None = None
        self.prompts: list[list[int]] = []
        self.vocab_size: int | None = None
        self.writes = is_rank_zero()

    def rewind(self, step: int) -> None:
        """Remove the samples after `step`, which a resumed run writes again."""
        if self.writes:
            forget_lines_after(self.path, step)

    def fit_start(self, state: State, logger: Logger) -> None:
        if not self.config.prompts:
            return
        assert isinstance(state.model, RWKV7ForTraining)
        register_fsdp_forward_method(state.model.network, "step")  # no effect if the network is not sharded
        encoded: list[Any] = [[], None]
        if self.writes:
            tokenizer = self.tokenizer = load_tokenizer(self.tokenizer_folder)
            prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in self.config.prompts]
            encoded = [prompts, tokenizer.vocab_size]
        self.prompts, self.vocab_size = broadcast_object(encoded)

    def eval_end(self, state: State, logger: Logger) -> None:
        if not self.prompts:
            return
        assert isinstance(state.model, RWKV7ForTraining)
        with get_precision_context(state.precision, state.precision_config):
            samples = [self._sample(state.model, number) for number in range(len(self.prompts))]
        release_weights(state.model)
        if self.writes:
            self._write(samples, int(state.timestamp.batch), logger)

    def _sample(self, model: RWKV7ForTraining, number: int) -> list[int]:
        # No stop token: ranks whose logits differ in the last bit must still take the same number of steps, or they
        # would wait for each other indefinitely.
        tokens = generate_tokens(
            model.network,
            self.prompts[number],
            max_tokens=self.config.sample_tokens,
            temperature=self.config.sample_temperature,
            top_p=self.config.sample_top_p,
            vocab_size=self.vocab_size,
            generator=torch.Generator().manual_seed(self.seed + number),
        )
        return list(tokens)

    def _write(self, samples: Sequence[list[int]], step: int, logger: Logger) -> None:
        assert self.tokenizer is not None
        texts = [text_until_end(tokens, end=self.tokenizer.eos_id, decode=self.tokenizer.decode) for tokens in samples]
        rows = list(zip(self.config.prompts, texts, strict=True))
        lines = [
            json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n"
            for prompt, text in rows
        ]
        with append_to(self.path) as file:
            file.write("".join(lines).encode())
        for number, (prompt, text) in enumerate(rows):
            print(f"sample at step {step}: {prompt!r} → {_beginning(text)!r}", flush=True)
            for destination in logger.destinations:
                if isinstance(destination, TensorboardLogger) and destination.writer is not None:
                    # Markdown: a fence keeps line breaks.
                    content = f"````\n{prompt}{text}\n````"
                    destination.writer.add_text(f"samples/{number}", content, global_step=step)
        logger.log_table(["step", "prompt", "text"], [[step, *row] for row in rows], name="samples", step=step)


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def text_until_end(tokens: Sequence[int], *, end: int, decode: Callable[[Sequence[int]], str]) -> str:
    """Return the text of the tokens before the first `end`."""
    tokens = list(tokens)
    return decode(tokens[: tokens.index(end)] if end in tokens else tokens)
