"""The hot loop of llm-foundry's convert_dataset_json / convert_text_to_mds, re-stated: not its whole program.

Each of the processes takes its share of the files, tokenizes one document after another with a transformers tokenizer,
concatenates with eos, and writes 2048-token samples with MDSWriter and zstd; what does not fill the last is dropped.

python llm_foundry_loop.py INPUT OUT TOKENIZER_FOLDER EOS_TOKEN WORKERS
"""

import gzip
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from streaming import MDSWriter
from transformers import AutoTokenizer

LENGTH = 2048


def texts(file):
    if file.suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()
    else:
        with gzip.open(file) as lines:
            for line in lines:
                yield json.loads(line)["text"]


def convert(share):
    files, out, folder, eos_token = share
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = tokenizer(eos_token, add_special_tokens=False)["input_ids"]
    buffer = []
    columns = {"tokens": "ndarray:int32"}
    with MDSWriter(out=out, columns=columns, compression="zstd") as writer:
        for file in files:
            for text in texts(file):
                buffer += tokenizer(text, truncation=False, padding=False, add_special_tokens=False)["input_ids"] + eos
                while len(buffer) >= LENGTH:
                    writer.write({"tokens": np.asarray(buffer[:LENGTH], np.int32)})
                    buffer = buffer[LENGTH:]


def main() -> None:
    folder, out, tokenizer, eos_token, workers = sys.argv[1:6]
    files = sorted(file for file in Path(folder).rglob("*") if file.name.endswith((".parquet", ".jsonl.gz")))
    count = int(workers)
    # By size, so that the shares are as even as files allow.
    shares = [[] for _ in range(count)]
    for file in sorted(files, key=lambda file: -file.stat().st_size):
        min(shares, key=lambda share: sum(other.stat().st_size for other in share)).append(file)
    with multiprocessing.Pool(count) as pool:
        pool.map(convert, [(share, f"{out}/{index}", tokenizer, eos_token) for index, share in enumerate(shares)])


if __name__ == "__main__":
    main()
