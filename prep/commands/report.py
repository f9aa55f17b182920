"""`report`: a self-contained page about a data set, and its numbers as JSON."""

from __future__ import annotations

import argparse
import html
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prep.commands.inspection import ShownPiece, pieces_of_shard
from prep.dataset.finished import DataSet, FileMissing, open_data_set
from prep.dataset.names import REPORT_NAME, STATISTICS_NAME
from prep.stages.distributions import Statistics, parse_statistics
from streaming_rwkv.config import UserError
from streaming_rwkv.console import shown, shown_bytes
from streaming_rwkv.filesystem import check_replaceable, explained_writes, make_folder, sole_writer, write_atomically
from streaming_rwkv.location import is_remote
from streaming_rwkv.outputs import check_outside
from streaming_rwkv.pages import is_page, render
from streaming_rwkv.shards import DataError, Manifest, StreamRecord, bucket_bounds, bucket_name, read_small_file
from streaming_rwkv.version import PROGRAM, __version__

_SAMPLES_PER_STREAM = 6
_SAMPLE_CHARACTERS = 1600
# Paul Tol's "bright" and "muted" palettes, distinguishable on white and on black with any colour vision.
PALETTE = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#6655BB", "#999933", "#BB5566", "#44AA99"]


def run(options: argparse.Namespace) -> int:
    """Write a data set's report and print its path; return the exit status."""
    page = write_report(options.out, to=options.to)
    print(f"{shown(str(page))}: {shown_bytes(page.stat().st_size)}; open {shown(page.resolve().as_uri())}")
    return 0


def write_report(out: str | Path, *, to: str | Path | None = None) -> Path:
    """Write report.html and report.json to the folder `to`, by default the data set's own.

    Raises:
        DataError: no finished data set, or one without its statistics.
        UserError: the folder cannot be created or written to, holds files of these names that are no report, or another
            process writes a report there.
    """
    if to is None and is_remote(out):
        raise UserError(f"{out}: a report cannot be written to S3; name a local folder with `--to FOLDER`")
    folder = Path(to or out)
    what, remedy = "folder of the report", "name another with `--to FOLDER`"
    if is_remote(out) or os.path.realpath(folder) != os.path.realpath(out):
        check_outside(folder, what=what, remedy=remedy)
    with open_data_set(out) as data_set:
        manifest = data_set.manifest()
        statistics = _statistics(data_set, manifest)
        make_folder(folder, what=what, remedy=remedy)
        figures = report_figures(manifest, statistics) | {"location": str(out)}
        samples = sample_pieces(data_set, manifest)
    content = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    numbers, page = (folder / f"{REPORT_NAME}.{ending}" for ending in ("json", "html"))
    title = str(out).rstrip("/") if is_remote(out) else Path(out).resolve().name
    with sole_writer(folder, what=what, remedy=remedy), explained_writes(folder):
        check_replaceable(numbers, _are_figures, remedy=remedy)
        check_replaceable(page, is_page, remedy=remedy)
        write_atomically(numbers, content.encode())
        write_atomically(page, report_page(figures, samples, title=title).encode())
    return page


def _are_figures(path: Path) -> bool:
    """Return whether a file has the numbers of a report."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"fingerprint", "tokenizer", "totals", "streams", "location"} <= found.keys()


def _statistics(data_set: DataSet, manifest: Manifest) -> Statistics:
    files = data_set.files([(STATISTICS_NAME, None)])  # the file exists as long as this
    try:
        file = next(files)
    except FileMissing:
        raise DataError(
            f"{data_set.location}/{STATISTICS_NAME}: missing; copy it from the folder where the data set was built"
        ) from None
    where = f"{data_set.location}/{STATISTICS_NAME}"
    statistics = parse_statistics(read_small_file(file), where=where)
    if unknown := [source for source in statistics.sources if source not in manifest.counts]:
        raise DataError(f"{where}: has the source {unknown[0]!r}, which the manifest does not have; build again")
    return statistics


def report_figures(manifest: Manifest, statistics: Statistics) -> dict[str, Any]:
    """Return all numbers of the page."""
    buckets = [bucket_name(lower, upper) for lower, upper in bucket_bounds(manifest.edges)]
    streams = [_stream_figures(stream, manifest) for stream in manifest.streams]
    fill: list[int] = [0] * statistics.fill_bins
    for counts in statistics.fill.values():
        fill = [left + right for left, right in zip(fill, counts, strict=True)]
    return {
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.model_dump(),
        "pack_tokens": manifest.pack_tokens,
        "totals": {
            "documents_read": sum(counts.documents_read for counts in manifest.counts.values()),
            "documents": sum(stream.documents for stream in manifest.streams),
            "tokens": sum(stream.targets for stream in manifest.streams),
            "text_bytes_read": sum(source.text_bytes for source in statistics.sources.values()),
            "text_bytes": sum(stream.bytes for stream in manifest.streams),
            "packs": sum(stream.packs for stream in manifest.streams),
            "shard_bytes": sum(shard.bytes for stream in manifest.streams for shard in stream.shards),
            "fill": _fill(manifest.streams, manifest),
        },
        "buckets": buckets,
        "cut_tokens": manifest.edges[-1],
        "lengths_per_doubling": statistics.lengths_per_doubling,
        "counts": {source: counts.model_dump() for source, counts in manifest.counts.items()},
        "streams": streams,
        "lengths": {
            source: {
                f"{2 ** (step / statistics.lengths_per_doubling):.0f}": count
                for step, count in sorted(of_source.lengths.items())
            }
            for source, of_source in statistics.sources.items()
        },
        "fill": {f"{step / statistics.fill_bins:.0%}": count for step, count in enumerate(fill)},
    }


def _stream_figures(stream: StreamRecord, manifest: Manifest) -> dict[str, Any]:
    return {
        "split": stream.split,
        "source": stream.source,
        "bucket": stream.bucket,
        "documents": stream.documents,
        "pieces": stream.pieces,
        "tokens": stream.targets,
        "text_bytes": stream.bytes,
        "packs": stream.packs,
        "fill": _fill([stream], manifest),
    }


def _fill(streams: Sequence[StreamRecord], manifest: Manifest) -> float:
    packs = sum(stream.packs for stream in streams)
    return sum(stream.targets for stream in streams) / (packs * manifest.pack_tokens) if packs else 0.0


def sample_pieces(data_set: DataSet, manifest: Manifest, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return pieces of each training stream, drawn from the packs of one of its shards."""
    generator = random.Random(seed)  # not for secrets: the same report for the same data set
    samples = []
    for stream in manifest.select("train"):
        if not stream.shards:
            continue
        pieces = pieces_of_shard(
            data_set, manifest, stream, generator.randrange(len(stream.shards)), generator=generator
        )
        for piece in itertools.islice(pieces, _SAMPLES_PER_STREAM):
            samples.append(_sample(piece, stream))
    generator.shuffle(samples)
    samples.sort(key=lambda sample: not sample["begins"])  # whole beginnings first
    return samples


def _sample(piece: ShownPiece, stream: StreamRecord) -> dict[str, Any]:
    text, rest, left_out = piece.text, "", max(0, len(piece.text) - _SAMPLE_CHARACTERS)
    if left_out:
        half = _SAMPLE_CHARACTERS // 2
        text, rest = text[:half], text[-half:]
    return {
        "source": stream.source,
        "bucket": stream.bucket,
        "shard": piece.shard,
        "pack": piece.pack,
        "key": f"{piece.key:016x}",
        "targets": piece.targets,
        "bytes": piece.bytes,
        "begins": piece.begins,
        "ends": piece.ends,
        "text": shown(text, lines=True),
        "rest": shown(rest, lines=True),
        "left_out": left_out,
    }


# --- the page ---


def report_page(figures: dict[str, Any], samples: list[dict[str, Any]], *, title: str) -> str:
    """Return the page as HTML without references to other files; scripts in it draw the plots and the tables."""
    colors = dict(zip(figures["counts"], itertools.cycle(PALETTE)))
    data = {"figures": figures, "samples": samples, "colors": colors}
    body = f"<h1>{html.escape(title)}</h1>{_about(figures)}{_cards(figures)}{_SECTIONS}"
    return render(title, body, data, scripts=["charts.js", "report.js"])


def _about(figures: dict[str, Any]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M")
    about = (
        f"{figures['location']} · report of {written} by {PROGRAM} {__version__} · fingerprint "
        f"{figures['fingerprint'][:16]}"
    )
    return f"<p class='quiet'>{html.escape(about)}</p>"


def _cards(figures: dict[str, Any]) -> str:
    totals, tokenizer = figures["totals"], figures["tokenizer"]
    cards = [
        (f"{totals['documents']:,}", f"documents of {totals['documents_read']:,} read"),
        (
            f"{totals['tokens'] / 1e6:,.1f} M",
            f"tokens, {totals['text_bytes'] / max(1, totals['tokens']):.2f} bytes each",
        ),
        (shown_bytes(totals["text_bytes"]), f"text; {shown_bytes(totals['shard_bytes'])} of shards"),
        (f"{totals['packs']:,}", f"packs of {figures['pack_tokens']:,} tokens"),
        (f"{totals['fill']:.1%}", "of the packs filled"),
        (html.escape(tokenizer["name"]), f"tokenizer, {tokenizer['vocab_size']:,} ids"),
    ]
    values = "".join(f"<div class='card'><b>{value}</b><span>{name}</span></div>" for value, name in cards)
    return f"<div class='cards'>{values}</div>"


_SECTIONS = f"""
<section><h2>Sources</h2><div id='sources'></div><h2>Rejected documents</h2><div id='rejections' class='quiet'></div>
</section>
<section><h2>Length of documents</h2>
<p class='quiet'>Before deduplication and cutting; four bars for each doubling of the length.</p>
<div class='panels' id='lengths'></div></section>
<section><h2>Tokens by bucket and source</h2>
<div class='panels'><div id='tokens'></div><div id='shares'></div></div><div class='legend' id='token-legend'></div>
</section>
<section><h2>Fill of packs</h2><div id='fill'></div></section>
<section><h2>Streams</h2><div class='controls' id='stream-controls'></div><div id='streams'></div></section>
<section><h2>Samples, as the model sees them</h2>
<p class='quiet'>Some documents of each stream; <code>{PROGRAM} inspect</code> shows all.</p>
<div class='controls' id='sample-controls'></div><div id='samples'></div></section>
"""
