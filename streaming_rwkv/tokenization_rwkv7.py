"""A tokenizer that begins each text with bos, as documents began in training: self-contained exports carry this file.

    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

The tokenizer.json beside it gives the same ids without bos.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


class RWKV7TokenizerFast(PreTrainedTokenizerFast):
    """The tokenizer of a tokenizer.json, with bos before each text."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        # Not in __init__: transformers 5 reads a tokenizer.json in parts for a class that has its own.
        tokenizer = super().from_pretrained(*arguments, **options)
        tokenizer.update_post_processor()
        return tokenizer

    def update_post_processor(self) -> None:
        """Add bos, unless the tokenizer.json does; transformers 5 calls this too."""
        if self.backend_tokenizer.num_special_tokens_to_add(False) == 0:
            bos = {"id": "bos", "ids": [self.bos_token_id], "tokens": [self.bos_token]}
            self.backend_tokenizer.post_processor = TemplateProcessing(
                single="bos $A", pair="bos $A bos $B", special_tokens=[bos]
            )
