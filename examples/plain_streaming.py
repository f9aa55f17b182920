"""Read documents with MosaicML's StreamingDataset alone: the shards are ordinary MDS.

    python examples/plain_streaming.py DATA_SET

A sample is a pack. Its `tokens` are those of its pieces, one after another; `lengths` are the tokens of each piece.
docs/contract.md has all columns. Nothing here is verified or resumed: `streaming_rwkv.open_dataset` does that.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from streaming import StreamingDataset

from streaming_rwkv import load_tokenizer, read_manifest


def read_documents(data: Path, *, source: str, split: str = "train") -> Iterator[str]:
    """Yield the text of each document, or piece of a long document, of a source in a local data set."""
    tokenizer = load_tokenizer(data / "tokenizer")
    for stream in read_manifest(data).streams:
        if (stream.source, stream.split) != (source, split):
            continue
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
    name = options.source or read_manifest(options.data).streams[0].source
    for text in itertools.islice(read_documents(options.data, source=name), options.documents):
        print(text[:200].replace("\n", " "), end="\n\n")
