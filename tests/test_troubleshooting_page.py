"""docs/troubleshooting.md quotes the messages that the sources contain."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming_rwkv.version import PROGRAM

ROOT = Path(__file__).parent.parent
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").replace("`", "").split())

MESSAGES = [
    "microbatch_packs: not even one pack of",
    "tokens fits into this device's memory; set model.activation_checkpointing=true, use more processes or a smaller "
    "model, or build with smaller packs",
    ": loader process",
    "most often the machine or the container ran out of memory (see dmesg): give the job more, or",
    "set data.workers or data.fetch_ahead lower; the same command resumes from the newest checkpoint",
    "not a local folder, and the Hugging Face hub does not provide it",
    "check the name, run huggingface-cli login if it is gated, or give a local folder",
    "; its regular expressions may backtrack indefinitely",
    "no C++ compiler (c++, g++, clang++) on PATH, and the CPU kernel is compiled on first use; install one",
    "which is no program here; set it to a C++ compiler, or unset it",
    "GCC 9 or newer and Clang 12 or newer are known to work; choose one with CXX",
    "the CUDA kernels are compiled through cuda-core, which does not import here",
    "NVRTC does not compile it for",
    "use a GPU that does (A100, H100 and newer), or float32 inputs",
    "is in use (by process",
    "give this run its own save_folder",
    "the file system has no locks (flock), so two processes that write here would not notice each other; start one at "
    "a time, or mount it with flock (Lustre: -o flock, NFS: without nolock)",
    "another run has taken over this place:",
    "only one run may write here; stop the other, or give this one its own save_remote",
    "check the storage and the network, give the run more loader",
    "it is overloaded or broken: try again later",
    "made by a run with other settings; steps already taken would not be those of this run.",
    "Give the run another save_folder, set the value back, or, if the change is meant, say checkpoint.allow_changed=[",
    "made with a data set of the format streaming-rwkv/1, which can no longer be read; rebuild it with "
    "streaming-rwkv prepare RECIPE, and start a run from these weights in another save_folder",
    "bring the files there, or move it away on every node to resume from the one before it (with save_remote, a node "
    "fetches the files that it lacks)",
    "holds an unfinished build",
    "continue with the input as it is now (--accept-changes, in Python accept_changes=True; finished work on unchanged "
    "input is kept),",
    "/dev/shm: no room for the shared memory of the data loader",
    "remove what other programs left there, or make it larger (docker run --shm-size=1g; mount -o remount,size=1g "
    "/dev/shm)",
    "/dev/shm has no room for the semaphores of its queues; make it larger, or",
    "make space; the same command resumes from the newest checkpoint",
    "make space (unfinished work needs about five bytes for each token, beside the shards), then run the same command "
    "again: finished work is kept",
    "this process has reached its limit of",
    "no memory is left, of",
    "in each process, but there are only",
    "make the model smaller, or use more processes",
]


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield the constant strings, and of f-strings the constant parts with their constants' values between them."""
    names = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    } | {"PROGRAM": PROGRAM}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = []
            for part in node.values:
                if isinstance(part, ast.Constant):
                    parts.append(str(part.value))
                elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
                    parts.append(names.get(part.value.id, "\0"))
                else:
                    parts.append("\0")
            yield "".join(parts)


@functools.cache
def source_strings() -> str:
    files = [path for package in ("prep", "streaming_rwkv") for path in sorted((ROOT / package).rglob("*.py"))]
    found = (text for path in files for text in strings(ast.parse(path.read_text(encoding="utf-8"))))
    return "\n".join(" ".join(text.replace("`", "").split(" ")) for text in found)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_occurs_in_the_sources(message: str) -> None:
    assert message in PAGE
    assert message in source_strings()
