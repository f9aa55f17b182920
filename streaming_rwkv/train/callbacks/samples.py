"""Text at each evaluation, from fixed prompts: what the numbers do not show.

The recurrent form is used, so a token costs the same however long the text is. Each prompt has its own random numbers,
the same at every evaluation: what changes from one to the next is the model. Nothing of the training's randomness is
touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger, TensorboardLogger
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from streaming_rwkv.distributed import broadcast_object, is_rank_zero
from streaming_rwkv.inference.sampling import generate
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.callbacks.json_lines import forget_lines_after
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import EvaluationConfig


class Samples(Callback):
    """Goes on with each of the prompts, and writes a line for each: {"step", "prompt", "text"}."""

    def __init__(self, path: Path, config: EvaluationConfig, *, tokenizer_folder: Path, seed: int) -> None:
        """`tokenizer_folder` is needed on the first rank alone, and only where there are prompts."""
        self.path = path
        self.config = config
        self.tokenizer_folder = tokenizer_folder
        self.seed = seed
        self.tokenizer: Tokenizer | None = None
        self.prompts: list[list[int]] = []
        self.vocab_size: int | None = None
        self.writes = is_rank_zero()

    def rewind(self, step: int) -> None:
        """Forget the samples after `step`: a resumed run draws them again."""
        if self.writes:
            forget_lines_after(self.path, step)

    def fit_start(self, state: State, logger: Logger) -> None:
        if not self.config.prompts:
            return
        assert isinstance(state.model, RWKV7ForTraining)
        register_fsdp_forward_method(state.model.network, "step")  # nothing, where the network is not sharded
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
            drawn = [self._draw(state.model, number) for number in range(len(self.prompts))]
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward leaves the root's weights gathered
        if self.writes:
            self._write(drawn, int(state.timestamp.batch), logger)

    def _draw(self, model: RWKV7ForTraining, number: int) -> list[int]:
        # No token stops it: ranks that do not agree to the last bit on what is likeliest must still take as many
        # steps as each other, or they would wait for ever.
        tokens = generate(
            model.network,
            self.prompts[number],
            max_tokens=self.config.sample_tokens,
            temperature=self.config.sample_temperature,
            top_p=self.config.sample_top_p,
            vocab_size=self.vocab_size,
            generator=torch.Generator().manual_seed(self.seed + number),
        )
        return list(tokens)

    def _write(self, drawn: Sequence[list[int]], step: int, logger: Logger) -> None:
        assert self.tokenizer is not None
        texts = [text_until_end(tokens, end=self.tokenizer.eos_id, decode=self.tokenizer.decode) for tokens in drawn]
        rows = list(zip(self.config.prompts, texts, strict=True))
        with open(self.path, "a", encoding="utf-8") as file:
            for prompt, text in rows:
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        for number, (prompt, text) in enumerate(rows):
            print(f"step {step}  {prompt!r} → {text!r}", flush=True)
            for destination in logger.destinations:
                if isinstance(destination, TensorboardLogger) and destination.writer is not None:
                    # Markdown: a fence keeps line breaks.
                    content = f"````\n{prompt}{text}\n````"
                    destination.writer.add_text(f"samples/{number}", content, global_step=step)
        logger.log_table(["step", "prompt", "text"], [[step, *row] for row in rows], name="samples", step=step)


def text_until_end(tokens: Sequence[int], *, end: int, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of the tokens before the first `end`."""
    tokens = list(tokens)
    return decode(tokens[: tokens.index(end)] if end in tokens else tokens)
