"""Read documents with MosaicML's StreamingDataset alone: the shards are ordinary MDS.

    python examples/plain_streaming.py DATA_SET

A sample is a pack. Its `tokens` are those of its pieces, one after another; `lengths` are the tokens of each piece.
docs/contract.md has all columns. Nothing here is verified or resumed: `streaming_rwkv.open_dataset` does that.
Streaming leaves a lock file in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from streaming import StreamingDataset

from streaming_rwkv import UserError, read_manifest
from streaming_rwkv.tokenizer import load_tokenizer_of


def read_documents(data: Path, *, source: str, split: str = "train") -> Iterator[str]:
    """Yield the text of each document, or piece of a long document, of a source in a local data set.

    Raises:
        UserError: no such data set, or no such source in it.
    """
    manifest = read_manifest(data)
    wanted = [stream for stream in manifest.streams if (stream.source, stream.split) == (source, split)]
    if not wanted:
        sources = sorted({stream.source for stream in manifest.streams if stream.split == split})
        raise UserError(f"{data}: has no {split} packs of the source {source!r}; there are {', '.join(sources)}")
    tokenizer = load_tokenizer_of(manifest, data / "tokenizer")
    for stream in wanted:
        with TemporaryDirectory() as cache:
            packs = StreamingDataset(remote=str(data / stream.path), local=cache, batch_size=1, shuffle=False)
            for number in range(packs.num_samples):
                pack = packs[number]
                for piece in np.split(pack["tokens"], np.cumsum(pack["lengths"])[:-1]):
                    yield tokenizer.decode(piece.tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="a folder that `prep` has built")
    parser.add_argument("--source", help="by default the first")
    parser.add_argument("--documents", type=int, default=3, help="how many to print (default: 3)")
    options = parser.parse_args()
    if options.documents < 0:
        parser.error(f"--documents: found {options.documents}, expected 0 or more")
    try:
        name = options.source or read_manifest(options.data).streams[0].source
        for text in itertools.islice(read_documents(options.data, source=name), options.documents):
            print("".join(character if character.isprintable() else " " for character in text[:200]), end="\n\n")
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # noqa: BLE001 - Streaming has no errors of its own, and verifies nothing
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        sys.exit(
            f"error: {options.data}: Streaming cannot read it ({problem}); try streaming-rwkv verify {options.data}"
        )
