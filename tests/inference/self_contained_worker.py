"""A self-contained folder as a user of transformers loads it, where neither this project nor fla can be imported.

python self_contained_worker.py FOLDER WORLD_FOLDER REQUEST.json OUT.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Absent:
    """Packages that cannot be imported."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in ("streaming_rwkv", "prep", "fla"):
            raise ModuleNotFoundError(f"{name} is not to be imported")


sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def padded(rows: list[list[int]], width: int, *, left: bool) -> dict[str, torch.Tensor]:
    """Rows of ids in a batch, with 7 as padding."""
    ids = [[7] * (width - len(row)) + row if left else row + [7] * (width - len(row)) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    if not left:
        mask = [row[::-1] for row in mask]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def texts_of(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Ids with and without bos, and the texts again."""
    ids = tokenizer(texts)["input_ids"]
    return [
        ids,
        tokenizer(texts, add_special_tokens=False)["input_ids"],
        [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    ]


def main(folder: Path, world: Path, request: dict[str, Any], out: Path) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    trusted: dict[str, Any] = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trusted).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    worlds = AutoTokenizer.from_pretrained(world, **trusted)
    rows, texts = request["rows"], request["texts"]
    longest = torch.tensor([max(rows, key=len)])
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["logits"] = [model(torch.tensor([row])).logits[0] for row in rows]
        width = 5 + longest.shape[1]
        for side in ("left", "right"):
            found[side] = model(**padded(rows, width, left=side == "left")).logits
        parts = []
        state = None
        for part in longest.split([1, 1, 20, longest.shape[1] - 22], dim=1):
            output = model(part, state=state)
            state = output.state
            parts.append(output.logits[0])
        found["parts"] = torch.cat(parts)
        found["state_bytes"] = sum(x.nbytes for layer in state.layers for x in layer)
        options: dict[str, Any] = {"max_new_tokens": request["new_tokens"], "do_sample": False}
        prompts = tokenizer(texts, padding=True, return_tensors="pt")
        found["prompts"], found["greedy"] = prompts["input_ids"], model.generate(**prompts, **options)
        found["greedy_uncached"] = model.generate(**prompts, **options, use_cache=False)
        found["beams"] = model.generate(**prompts, **options, num_beams=3)
        found["beams_uncached"] = model.generate(**prompts, **options, num_beams=3, use_cache=False)
        model.save_pretrained(out.parent / "again")
        tokenizer.save_pretrained(out.parent / "again")
        worlds.save_pretrained(out.parent / "world_again")
        again = AutoModelForCausalLM.from_pretrained(out.parent / "again", **trusted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found["autocast"] = again(longest).logits[0].float()
        narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **trusted)
        found["bfloat16"] = narrow(longest).logits[0].float()
        found["again"] = again(longest).logits[0]
        try:
            model(longest, attention_mask=torch.ones(1, 1, 3, 3))
        except ValueError as error:
            found["refusal"] = str(error)
    loss = model(longest, labels=longest).loss
    loss.backward()
    found["loss"] = loss.detach()
    found["without_gradient"] = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    found["tokenizers"] = [texts_of(tokenizer, texts), texts_of(worlds, texts)]
    found["tokenizers_again"] = [
        texts_of(AutoTokenizer.from_pretrained(out.parent / name, **trusted), texts)
        for name in ("again", "world_again")
    ]
    torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4]))
