"""Content hashes of the input files, by which a later start recognizes a copy of the corpus."""

from __future__ import annotations

from typing import Any

from prep.execution.context import BuildContext
from prep.execution.observer import Observer
from prep.execution.resume import state_key
from prep.execution.steps import run_step
from prep.execution.tasks import Report, Run
from prep.inputs.files import InputFile, content_digest


def hash_inputs(files: dict[str, list[InputFile]], run: Run, observer: Observer) -> dict[str, str]:
    """Return the digest of each file by its key in the build's state: a copy has other times and the same digests.

    Files are read again, as a whole: tokenization reads only one column of a parquet file.
    """
    items = [file for of_source in files.values() for file in of_source]
    sizes = [(file.source, file.size) for file in items]
    digests: list[Any] = run_step("hashing files", run, _hash_file, items, sizes, observer, in_bytes=True)
    return dict(zip(map(state_key, items), digests, strict=True))


def _hash_file(context: BuildContext, file: InputFile, report: Report) -> str:
    return content_digest(file)
