"""datatrove: DocumentTokenizer on every document, as its examples run it. No packing, no buckets.

python datatrove_tokens.py INPUT OUT TOKENIZER_FOLDER EOS_TOKEN WORKERS
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    folder, out, tokenizer, eos_token, workers = sys.argv[1:6]
    is_parquet = "parquet" in folder
    reader = ParquetReader if is_parquet else JsonlReader
    pattern = "**/*.parquet" if is_parquet else "**/*.jsonl.gz"
    tokenize = DocumentTokenizer(
        output_folder=f"{out}/tokens", tokenizer_name_or_path=f"{tokenizer}/tokenizer.json", eos_token=eos_token
    )
    LocalPipelineExecutor(
        pipeline=[reader(folder, glob_pattern=pattern), tokenize],
        tasks=int(workers),
        workers=int(workers),
        logging_dir=f"{out}/logs",
    ).run()


if __name__ == "__main__":
    main()
