"""`train-tokenizer`: a byte-level BPE on the sources of a configuration."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prep.config import PrepConfig, SourceConfig
from prep.document import LineCounts, add_counts
from prep.inputs.files import InputFile
from prep.inputs.readers import CutFiles, nothing_in, read_unit
from prep.inputs.text_keys import check_text_keys
from prep.inputs.units import find_sources, plan_units
from streaming_rwkv.config import UserError, load_config
from streaming_rwkv.filesystem import atomic_folder, explained_writes, make_folder
from streaming_rwkv.outputs import check_outside
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.tokenizers.definition import MOST_IDS

END_OF_TEXT = "<|endoftext|>"
_UNIT_BYTES = 1 << 22


def run(options: argparse.Namespace) -> int:
    """Train a tokenizer and print how to use it; return the exit status."""
    config = load_config(PrepConfig, options.config, overrides=options.overrides)
    tokenizer = train_tokenizer(
        config.sources, vocab_size=options.vocab_size, to=options.to, most_bytes=options.most_bytes
    )
    if tokenizer.vocab_size < options.vocab_size:
        print(
            f"warning: {tokenizer.vocab_size:,} tokens instead of {options.vocab_size:,}: the text has no more pairs "
            "to merge; give more text, or a smaller --vocab-size"
        )
    print(f"{options.to}: {tokenizer.vocab_size} tokens; use it with tokenizer={options.to}")
    return 0


def train_tokenizer(
    sources: dict[str, SourceConfig], *, vocab_size: int, to: str | Path, most_bytes: int = 1 << 28
) -> Tokenizer:
    """Train on up to `most_bytes` of text, the same amount from each source, and save the tokenizer in the folder `to`.

    The vocabulary contains all 256 bytes, so that every text can be encoded, and one special token, both bos and eos.
    The merges depend on the text alone, not on the number of threads.

    Raises:
        UserError: the vocabulary is too small for the bytes; the folder cannot be written to, or is not empty; a
            source is empty or cannot be read.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not 257 <= vocab_size <= MOST_IDS:
        raise UserError(
            f"--vocab-size: found {vocab_size}, expected at least 257, the bytes and an end of text, and at most "
            f"{MOST_IDS:,}"
        )
    folder = Path(to).absolute()
    what, remedy = "folder of the tokenizer", "name another with `--to FOLDER`"
    check_outside(folder, what=what, remedy=remedy)
    make_folder(folder, what=what, remedy=remedy)
    if any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose another `--to`, or remove the folder")
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    files = find_sources(sources)
    check_text_keys(sources, files)
    share = most_bytes // len(sources)
    texts = [_texts(name, config, files[name], share) for name, config in sorted(sources.items())]
    trained.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    with explained_writes(folder), atomic_folder(folder) as whole:
        (whole / "tokenizer.json").write_text(trained.to_str(), encoding="utf-8")
        (whole / "special_tokens_map.json").write_text(json.dumps(special))
        tokenizer = load_tokenizer(whole)
        tokenizer.save(whole)
    return tokenizer


def _texts(name: str, config: SourceConfig, files: list[InputFile], most_bytes: int) -> Iterator[str]:
    """Yield texts of a source up to `most_bytes`, spread over its units."""
    units = plan_units({name: config}, unit_bytes=_UNIT_BYTES, files={name: files})
    of_each = -(-most_bytes // len(units))
    has_any = False
    rejected: Counter[str] = Counter()
    cut_files = CutFiles(units)
    for unit in units:
        left = of_each
        line_counts: dict[str, LineCounts] = {}
        for documents in read_unit(unit, config):
            rejected.update(rejection.reason for rejection in documents.rejections)
            line_counts = add_counts(itertools.chain(line_counts.items(), documents.line_counts.items()))
            for text in documents.texts:
                if left <= 0:
                    break
                has_any = True
                yield text
                left -= len(text.encode())
            if left <= 0:
                break
        else:
            cut_files.has_read(unit, line_counts)
    if not has_any:
        raise nothing_in(name, config, rejected=rejected)
