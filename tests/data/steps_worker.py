"""Run by test_steps.py: a rank of a process group opens the data with the others, and writes the packs it reads."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch.distributed as dist

from streaming_rwkv import open_dataset
from streaming_rwkv.processes import end_with


def main() -> None:
    data, cache, out = sys.argv[1:]
    dist.init_process_group("gloo")
    with open_dataset(data, batch_packs=4, cache=cache, workers=1) as dataset:
        packs = [
            [batch["tokens"][0, low:high].tolist() for low, high in itertools.pairwise(batch["pack_starts"].tolist())]
            for batch in dataset
        ]
    Path(out).write_text(json.dumps(packs))
    dist.barrier()


end_with(main)
