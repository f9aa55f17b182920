"""`train-tokenizer`: a byte-level BPE on the sources of a configuration."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prep.config import SourceConfig
from prep.inputs.line_check import LineCounts, add_counts
from prep.inputs.units import CutFiles, nothing_in, plan_units, read_unit
from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import atomic_folder, make_folder
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
_UNIT_BYTES = 1 << 22


def train_tokenizer(
    sources: dict[str, SourceConfig], *, vocab_size: int, to: str | Path, most_bytes: int = 1 << 28
) -> Tokenizer:
    """Train on up to `most_bytes` of text, an equal share of each source, and save it in the folder `to`.

    The vocabulary holds all 256 bytes, so every text can be encoded, and one special token that is bos and eos. The
    merges depend on the text alone, not on the number of threads.

    Raises:
        UserError: a vocabulary too small for the bytes; a folder that cannot be written to, or with something in it; an
            empty or unreadable source.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"--vocab-size: {vocab_size}, at least 257 are needed: the bytes and an end of text")
    folder = Path(to).absolute()
    make_folder(folder, what="folder of the tokenizer", remedy="name another with `--to FOLDER`")
    if any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose another `--to`, or remove it")
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    share = most_bytes // len(sources)
    texts = [_texts(name, config, share) for name, config in sorted(sources.items())]
    trained.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    with atomic_folder(folder) as whole:
        trained.save(str(whole / "tokenizer.json"))
        (whole / "special_tokens_map.json").write_text(json.dumps(special))
        tokenizer = load_tokenizer(whole)
        tokenizer.save(whole)
    return tokenizer


def _texts(name: str, config: SourceConfig, most_bytes: int) -> Iterator[str]:
    """Texts of a source up to `most_bytes`, spread over its units."""
    units = plan_units({name: config}, unit_bytes=_UNIT_BYTES)
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
