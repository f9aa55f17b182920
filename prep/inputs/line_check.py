"""Diagnosis of files that are not JSON lines, for error messages."""

from __future__ import annotations

_UTF16 = "UTF-16: save it as UTF-8"
_SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"\x1f\x8b": "compressed with gzip: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: add .zst to its name",
    b"\xfd7zXZ\0": "compressed with xz: add .xz to its name",
    b"BZh": "compressed with bzip2: add .bz2 to its name",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a parquet file: let its name end in .parquet",
}


def signature(begin: bytes) -> str | None:
    """Return the format that a file's first bytes indicate, with a remedy; None if they may be text."""
    for magic, what in _SIGNATURES.items():
        if begin.startswith(magic):
            return what
    return _UTF16 if begin[:2].count(0) == 1 else None


def describe(lines: int, not_objects: int, *, first: bytes, is_utf8: bool) -> str | None:
    """Return the text of the error for a file that is not JSON lines.

    Args:
        lines: the number of lines that are not blank.
        not_objects: the number of lines among them that are not JSON objects.
        first: the beginning of the first line that is not a JSON object.
        is_utf8: whether that line is UTF-8.

    Returns:
        None for a single broken document in a file of its own.
    """
    are_all = not_objects == lines
    begins = "it begins with" if are_all else "the first of them begins with"
    if what := signature(first):
        what = f"it is {what}"
    elif first.startswith(b"["):
        what = f"{begins} '[': let the name of a file that is one array end in .json, or write one object per line"
    elif first.startswith(b"{") and first.rstrip().endswith((b"{", b",")):
        what = f"{begins} an object that spans several lines: write one object per line"
    elif lines == 1:
        return None
    elif not is_utf8:
        what = "it is not UTF-8: convert it"
    else:
        what = f"{begins} {first.decode(errors='replace')!r}: write one object per line, or remove it from the source"
    found = (
        "no line of it is a JSON object" if are_all else f"{not_objects:,} of its {lines:,} lines are not JSON objects"
    )
    return f"{found}; {what}"
