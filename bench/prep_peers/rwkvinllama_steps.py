"""RWKVinLLAMA's preparation, re-stated with `datasets`: multi_source_datasets.py, then select_sub_dataset.py.

Step 1 tokenizes all sources together, pads or truncates to 2048, shifts the labels, splits off a validation set and
saves both. Step 2 runs over each of them once for every range of lengths and saves what falls into it.

python rwkvinllama_steps.py INPUT OUT TOKENIZER_FOLDER EOS_TOKEN WORKERS
"""

import sys
from pathlib import Path

from datasets import load_dataset, load_from_disk
from transformers import AutoTokenizer

LENGTH, STEP, VALIDATION = 2048, 256, 0.1


def combine(files, out, tokenizer, workers):
    kind = "parquet" if files[0].endswith(".parquet") else "json"
    data = load_dataset(kind, data_files=files, split="train").select_columns(["text"])

    def tokenize(batch):
        encoded = tokenizer(batch["text"], truncation=True, padding="max_length", max_length=LENGTH)
        labels = [[*ids[1:], tokenizer.pad_token_id] for ids in encoded["input_ids"]]
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    data = data.map(tokenize, batched=True, remove_columns=["text"], num_proc=workers)
    parts = data.train_test_split(test_size=VALIDATION)
    parts["train"].save_to_disk(f"{out}/train", num_proc=workers)
    parts["test"].save_to_disk(f"{out}/validation", num_proc=workers)


def select(out, split, workers):
    data = load_from_disk(f"{out}/{split}")
    for low in range(1, LENGTH, STEP):
        high = low + STEP - 1
        chosen = data.filter(
            lambda mask, low=low, high=high: low <= sum(mask) <= high, input_columns="attention_mask", num_proc=workers
        )
        if len(chosen):
            chosen.save_to_disk(f"{out}/{split}_{low}_{high}")


def main() -> None:
    folder, out, tokenizer_folder, _, workers = sys.argv[1:6]
    files = sorted(str(file) for file in Path(folder).rglob("*") if file.name.endswith((".parquet", ".jsonl.gz")))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.eos_token
    combine(files, out, tokenizer, int(workers))
    for split in ("train", "validation"):
        select(out, split, int(workers))


if __name__ == "__main__":
    main()
