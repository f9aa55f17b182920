"""Plots of one or more runs: `streaming-rwkv plot RUN [RUN …] [--overlay] [--to FILE.html|.png]`.

Consecutive runs, such as stages 1 and 2, are plotted one after another over the tokens of all. With `--overlay` each
run begins at 0, and their differences are listed. Only `metrics.jsonl` is read, so a run can be plotted during training
and without its data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from streaming_rwkv.arguments import CommandParser
from streaming_rwkv.extras import exit_if_missing

if __name__ == "__main__":
    exit_if_missing("numpy", "matplotlib", extra="train")  # before imports that would end in a traceback

from streaming_rwkv.console import run_command, shown
from streaming_rwkv.filesystem import atomic_file, check_replaceable, explained_writes, sole_writer, write_atomically
from streaming_rwkv.location import checked_local
from streaming_rwkv.outputs import check_outside
from streaming_rwkv.pages import is_page
from streaming_rwkv.plotting.figure import is_picture, write_picture
from streaming_rwkv.plotting.page import plot_page
from streaming_rwkv.plotting.panels import consecutive, overlaid
from streaming_rwkv.plotting.runs import History, PlotError, read_run
from streaming_rwkv.plotting.tables import differences, last_validation, summary
from streaming_rwkv.version import PROGRAM, __version__

SUFFIXES = (".html", ".png")
_REMEDY = "name another with `--to FILE`"


def write_plot(runs: Sequence[str | Path], *, to: str | Path, overlay: bool = False) -> None:
    """Plot runs in their order.

    Args:
        runs: save folders.
        to: a .html or .png file.
        overlay: compare the runs instead of plotting one after another.
    Raises:
        LocationError: a run or `to` that is not on this machine's disks.
        PlotError: see the class.
        UserError: `to` cannot be written, is being written, or is a file that is no plot.
    """
    runs = [checked_local(run, remedy="copy its metrics.jsonl to this machine") for run in runs]
    to = Path(checked_local(to))
    if to.suffix not in SUFFIXES:
        raise PlotError(f"{to}: found suffix {to.suffix!r}, expected {' or '.join(SUFFIXES)}")
    check_outside(to, what="plot", remedy=_REMEDY)
    history = History(runs=[read_run(run) for run in runs])
    plot = overlaid(history.runs) if overlay else consecutive(history)
    writing = sole_writer(to, what="plot", remedy=_REMEDY, is_folder=False)
    if to.suffix == ".png":
        with writing, explained_writes(to):
            check_replaceable(to, is_picture, remedy=_REMEDY)
            with atomic_file(to) as temporary:
                write_picture(plot, temporary)
        return
    tables = [("Runs", summary(history))]
    if overlay and len(history.runs) > 1:
        tables.append(("Differences", differences(history.runs)))
    last = [(f"Last evaluation of {run.name}", rows) for run in history.runs if (rows := last_validation(run))]
    about = f"{', '.join(map(str, runs))} · plotted by {PROGRAM} {__version__}"
    with writing, explained_writes(to):
        check_replaceable(to, is_page, remedy=_REMEDY)
        write_atomically(to, plot_page(plot, about=about, before=tables, after=last).encode())


def command_parser(program: str) -> CommandParser:
    """Return the parser of the command that draws runs."""
    parser = CommandParser(
        prog=program,
        description="Draw the curves of one or more runs.",
        examples=[
            "{prog} runs/stage1 runs/stage2",
            "{prog} runs/baseline runs/wider --overlay --to compared.html",
            "{prog} runs/stage2 --to stage2.png",
        ],
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="save folders, in the order in which they were trained")
    parser.add_argument(
        "--overlay", action="store_true", help="compare the runs, each from 0 tokens, instead of one after another"
    )
    parser.add_argument("--to", metavar="FILE", help=".html or .png (default: plot.html in the last RUN)")
    return parser


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m streaming_rwkv.plot") -> int:
    """Run the command that draws runs, and return its exit status."""
    options = command_parser(program).parse_intermixed_args(arguments)
    to = options.to or f"{options.runs[-1].rstrip('/')}/plot.html"

    def run() -> int:
        write_plot(options.runs, to=to, overlay=options.overlay)
        print(f"wrote {shown(str(to))}; open {shown(Path(to).resolve().as_uri())}")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
