"""`report`: a self-contained page about a data set, and its numbers as JSON."""

from __future__ import annotations

import argparse
import html
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prep.commands.inspection import ShownPiece, shown_pieces
from prep.commands.plots import PALETTE, bars, grouped_bars, histogram, legend
from prep.dataset.finished import DataSet, open_data_set
from prep.dataset.names import REPORT_NAME, STATISTICS_NAME
from prep.stages.distributions import Statistics, parse_statistics
from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import make_folder, write_atomically
from streaming_rwkv.location import is_remote
from streaming_rwkv.shards import SPLITS, DataError, Manifest, StreamRecord, bucket_bounds, bucket_name, read_small_file

_SAMPLES_PER_SOURCE = 2
_SAMPLE_CHARACTERS = 900


def run(options: argparse.Namespace) -> int:
    """Write a data set's report and print its path; return the exit status."""
    print(write_report(options.out, to=options.to))
    return 0


def write_report(out: str | Path, *, to: str | Path | None = None) -> Path:
    """Write report.html and report.json to the folder `to`, by default the data set's own.

    Raises:
        DataError: no finished data set, or one without its statistics.
        UserError: the folder cannot be created or written to.
    """
    if to is None and is_remote(out):
        raise UserError(f"{out}: a report cannot be written to S3; name a local folder with `--to FOLDER`")
    folder = Path(to or out)
    with open_data_set(out) as data_set:
        manifest = data_set.manifest()
        statistics = _statistics(data_set, manifest)
        make_folder(folder, what="folder of the report", remedy="name another with `--to FOLDER`")
        figures = report_figures(manifest, statistics)
        samples = sample_pieces(data_set, manifest)
    content = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{REPORT_NAME}.json", content.encode())
    page = folder / f"{REPORT_NAME}.html"
    title = str(out).rstrip("/") if is_remote(out) else Path(out).resolve().name
    write_atomically(page, report_page(figures, samples, title=title).encode())
    return page


def _statistics(data_set: DataSet, manifest: Manifest) -> Statistics:
    files = data_set.files([(STATISTICS_NAME, None)])  # the file exists as long as this
    try:
        file = next(files)
    except DataError:
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


def sample_pieces(data_set: DataSet, manifest: Manifest) -> dict[str, list[ShownPiece]]:
    """Return the first pieces of each source's shortest and longest bucket."""
    samples: dict[str, list[ShownPiece]] = {}
    for source in manifest.counts:
        streams = [stream for stream in manifest.select("train") if stream.source == source]
        chosen = [streams[0], streams[-1]] if len(streams) > 1 else streams
        samples[source] = list(
            itertools.chain.from_iterable(
                itertools.islice(shown_pieces(data_set, manifest, [stream]), _SAMPLES_PER_SOURCE) for stream in chosen
            )
        )
    return samples


# --- the page ---


def report_page(figures: dict[str, Any], samples: dict[str, list[ShownPiece]], *, title: str) -> str:
    """Return the page as HTML without references to other files."""
    sources = list(figures["counts"])
    colors = dict(zip(sources, itertools.cycle(PALETTE)))
    sections = [
        ("Length of documents", _length_plots(figures, colors)),
        ("Tokens by bucket and source", _token_plot(figures, colors)),
        ("Fill of packs", histogram(figures["fill"], color=PALETTE[0], x_name="fill", y_name="packs")),
        ("Documents and tokens by source", _documents_table(figures) + _rejection_plot(figures)),
        ("Streams", _streams_table(figures)),
        ("Samples, as the model sees them", _samples(samples)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
        f"<main><h1>{html.escape(title)}</h1>{_cards(figures)}{body}</main></html>\n"
    )


def _cards(figures: dict[str, Any]) -> str:
    totals, tokenizer = figures["totals"], figures["tokenizer"]
    cards = [
        (f"{totals['documents']:,}", f"documents of {totals['documents_read']:,} read"),
        (
            f"{totals['tokens'] / 1e6:,.1f} M",
            f"tokens, {totals['text_bytes'] / max(1, totals['tokens']):.2f} bytes each",
        ),
        (f"{totals['text_bytes'] / 1e6:,.1f} MB", f"text; {totals['shard_bytes'] / 1e6:,.1f} MB of shards"),
        (f"{totals['packs']:,}", f"packs of {figures['pack_tokens']:,} tokens"),
        (f"{totals['fill']:.1%}", "of the packs filled"),
        (html.escape(tokenizer["name"]), f"tokenizer, {tokenizer['vocab_size']:,} ids"),
    ]
    shown = "".join(f"<div class='card'><b>{value}</b><span>{name}</span></div>" for value, name in cards)
    return f"<div class='cards'>{shown}</div><p class='quiet'>fingerprint {figures['fingerprint']}</p>"


def _length_plots(figures: dict[str, Any], colors: dict[str, str]) -> str:
    def plot(source: str, lengths: dict[str, int]) -> str:
        shown = histogram(
            lengths, color=colors[source], x_name="length (inputs)", y_name="documents", width=420, height=200
        )
        return f"<figure><figcaption>{html.escape(source)}</figcaption>{shown}</figure>"

    plots = "".join(plot(source, lengths) for source, lengths in figures["lengths"].items())
    note = "Each bar is a quarter of a doubling; before deduplication and cutting."
    return f"<p class='quiet'>{note}</p><div class='grid'>{plots}</div>"


def _token_plot(figures: dict[str, Any], colors: dict[str, str]) -> str:
    tokens: dict[str, dict[str, float]] = {bucket: defaultdict(float) for bucket in figures["buckets"]}
    for stream in figures["streams"]:
        tokens[stream["bucket"]][stream["source"]] += stream["tokens"]
    return grouped_bars(tokens, colors=colors, x_name="bucket", y_name="tokens") + legend(colors)


def _documents_table(figures: dict[str, Any]) -> str:
    rows = [
        [
            source,
            counts["documents_read"],
            *(counts["documents"][split] for split in SPLITS),
            counts["duplicates"],
            sum(counts["rejected"].values()),
            counts["targets_read"],
            counts["targets_cut"],
        ]
        for source, counts in figures["counts"].items()
    ]
    head = ["source", "read", *SPLITS, "duplicates", "rejected", "tokens read", "tokens cut"]
    return _table(head, rows, text_columns=1)


def _rejection_plot(figures: dict[str, Any]) -> str:
    drops: dict[str, int] = defaultdict(int)
    for counts in figures["counts"].values():
        drops["duplicate"] += counts["duplicates"]
        for reason, count in counts["rejected"].items():
            drops[reason] += count
    shown = {reason: count for reason, count in sorted(drops.items(), key=lambda item: -item[1]) if count}
    return bars(shown, color=PALETTE[3]) if shown else "<p class='quiet'>Nothing was rejected.</p>"


def _streams_table(figures: dict[str, Any]) -> str:
    fields = ["documents", "pieces", "tokens", "packs"]
    rows = [
        [stream["split"], stream["source"], stream["bucket"], *(stream[field] for field in fields), stream["fill"]]
        for stream in figures["streams"]
    ]
    return _table(["split", "source", "bucket", *fields, "fill"], rows, text_columns=3)


def _table(head: list[str], rows: list[list[Any]], *, text_columns: int) -> str:
    def cell(value: Any, column: int) -> str:
        shown = f"{value:.1%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        return f"<td{'' if column < text_columns else ' class=number'}>{html.escape(shown)}</td>"

    names = "".join(
        f"<th{'' if column < text_columns else ' class=number'}>{name}</th>" for column, name in enumerate(head)
    )
    lines = "".join(f"<tr>{''.join(cell(value, column) for column, value in enumerate(row))}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"


def _samples(samples: dict[str, list[ShownPiece]]) -> str:
    return "".join(_sample(piece) for pieces in samples.values() for piece in pieces)


def _sample(piece: ShownPiece) -> str:
    text = piece.text
    if len(text) > _SAMPLE_CHARACTERS:
        half = _SAMPLE_CHARACTERS // 2
        text = f"{text[:half]}\n\n   […{len(text) - 2 * half:,} characters…]\n\n{text[-half:]}"
    begin = "<i>⟨bos⟩</i>" if piece.begins else "<i>… inside a document</i> "
    end = "<i>⟨eos⟩</i>" if piece.ends else " <i>cut here …</i>"
    head = f"{piece.stream} · {piece.targets:,} tokens · {piece.bytes:,} bytes"
    return f"<details open><summary>{html.escape(head)}</summary><pre>{begin}{html.escape(text)}{end}</pre></details>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--quiet:#667085;--line:#e3e7ee;--back:#fbfcfe;--card:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--quiet:#98a2b3;--line:#2b3342;--back:#12161e;--card:#1a202b}}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,"Noto Sans","Noto Sans CJK SC",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:26px;margin:0 0 16px}h2{font-size:18px;margin:40px 0 12px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:21px;overflow-wrap:anywhere}.card span,.quiet{color:var(--quiet);font-size:13px}
.quiet{overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:8px 20px}
figure{margin:0}figcaption{font-weight:600;font-size:13px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--quiet);font-size:11px}svg line{stroke:var(--line)}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;font-size:13px;margin-top:6px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;min-width:60%}
td,th{padding:4px 12px 4px 0;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums}
details{border:1px solid var(--line);border-radius:8px;margin:10px 0;background:var(--card)}
summary{padding:8px 12px;cursor:pointer;font-size:13px;color:var(--quiet)}
pre{margin:0;padding:4px 14px 14px;white-space:pre-wrap;overflow-wrap:anywhere}
pre{font:13px/1.5 ui-monospace,"Noto Sans Mono CJK SC",monospace}
pre i{color:#c2410c;font-style:normal;font-weight:600}
"""
