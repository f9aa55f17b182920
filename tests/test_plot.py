"""Drawing runs: the numbers behind the curves, done by hand, and the files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streaming_rwkv.filesystem import sole_writer
from streaming_rwkv.plot import main, write_plot
from streaming_rwkv.plotting.figure import labels_with_room
from streaming_rwkv.plotting.panels import Plot, consecutive, overlaid
from streaming_rwkv.plotting.runs import History, PlotError, mixture, read_run, smooth, thin
from streaming_rwkv.plotting.tables import differences, summary, validation_rows


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def steps(count: int, *, stage_of: Any = lambda step: 0) -> list[dict[str, Any]]:
    """Steps of 100 tokens; as Composer logs them, with the tokens before the step."""
    return [
        {
            "step": step,
            "time/token": 100 * (step - 1),
            "loss/train/total": 8.0 / step,
            "stage": stage_of(step),
            "optimizer/lr": 1e-3,
            "optimizer/gradient_norm": 1.0,
        }
        for step in range(1, count + 1)
    ]


def evaluation(step: int, loss: float) -> dict[str, Any]:
    groups = ("all", "source/web", "source/代码", "bucket/17-32", "bucket/1-16", "stream/web/1-16")
    return {
        "step": step,
        **{f"validation/{kind}/{group}": loss for kind in ("loss", "bits_per_byte") for group in groups},
    }


def test_values_are_plotted_over_the_tokens_after_their_step(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [*steps(3), evaluation(2, 5.0), evaluation(5, 4.0)]))
    assert [part.tolist() for part in run.series("loss/train/total")] == [[100, 200, 300], [8, 4, 8 / 3]]
    assert [part.tolist() for part in run.series("validation/loss/all")] == [[200, 500], [5, 4]]


def test_a_run_continues_where_the_one_before_it_ended(tmp_path: Path) -> None:
    first = write_run(tmp_path / "stage1", steps(4))
    second = write_run(tmp_path / "stage2", steps(6, stage_of=lambda step: (step - 1) // 2))
    history = History(runs=[read_run(first), read_run(second)])
    assert [tokens[0] for tokens, _ in history.curves("loss/train/total")] == [100, 500]
    assert history.marks() == [
        (0, "stage1", True),
        (400, "stage2, stage 0", True),
        (600, "stage 1", False),
        (800, "stage 2", False),
    ]


def test_the_mixture_is_what_was_consumed_between_two_points(tmp_path: Path) -> None:
    rows = steps(4)
    rows[1] |= {"share/web/1-16": 0.5, "share/web/17-32": 0.5}  # 100 and 100 of 200
    rows[3] |= {"share/web/1-16": 0.5, "share/web/17-32": 0.25, "share/code/1-16": 0.25}  # 200, 100, 100 of 400
    run = read_run(write_run(tmp_path / "run", rows))
    edges, sources = mixture(run, by=0)
    assert edges.tolist() == [0, 200, 400]
    assert {name: shares.tolist() for name, shares in sources.items()} == {"web": [1, 0.5], "code": [0, 0.5]}
    _, buckets = mixture(run, by=1)
    assert {name: shares.tolist() for name, shares in buckets.items()} == {"1-16": [0.5, 1], "17-32": [0.5, 0]}


def test_a_mean_of_neighbours_shrinks_at_the_ends() -> None:
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), 3).tolist() == [1.5, 3.0, 4.0, 5.0]
    assert smooth(np.array([1.0, 2.0, 6.0]), 1).tolist() == [1, 2, 6]


def test_a_value_that_is_missing_spoils_none_but_its_own() -> None:
    assert smooth(np.array([1.0, np.nan, 3.0, 5.0]), 3).tolist() == [1.0, 2.0, 4.0, 4.0]
    values = np.ones(6000)
    values[30] = np.nan
    assert thin(np.arange(6000.0), values)[1].tolist() == [1.0] * 2000


def test_a_long_curve_is_thinned_to_means() -> None:
    tokens = np.arange(6000.0)
    thinned, values = thin(tokens, 2 * tokens)
    assert (len(thinned), thinned[0], values[0], thinned[-1]) == (2000, 1.0, 2.0, 5998.0)


def test_the_page_is_complete_in_itself(tmp_path: Path) -> None:
    rows = [*steps(10, stage_of=lambda step: step // 6), evaluation(5, 5.25), evaluation(10, 4.125)]
    rows[9] |= {"share/web/1-16": 0.75, "share/代码/17-32": 0.25, "throughput/tokens_per_second": 1234.0}
    rows[-1] |= {"tasks/piqa/acc": 0.625, "tasks/piqa/acc_stderr": 0.1}
    first, second = write_run(tmp_path / "stage1", rows), write_run(tmp_path / "stage2", rows)
    assert main([str(first), str(second)]) == 0
    page = (second / "plot.html").read_text(encoding="utf-8")
    for text in (
        "stage1 → stage2",
        "Training loss",
        "Validation loss by source",
        "Validation loss by bucket",
        "Validation bits per byte by source",
        "Standard tasks",
        "piqa/acc",
        "Mixture consumed, by source",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "tokens trained on",
        "代码",
        "17-32",
        "stage 1",
    ):
        assert text in page, text
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', page))
    data = json.loads(re.findall(r"id='data'>(.*?)</script>", page)[0])
    assert [panel["title"] for panel in data["panels"]][:2] == ["Training loss", "Validation loss by source"]
    losses = next(panel for panel in data["panels"] if panel["title"] == "Validation loss by bucket")
    assert [series["name"] for series in losses["series"]] == ["1-16", "17-32", "all"]  # by length
    assert losses["series"][0]["parts"] == [[[500, 1000], [5.25, 4.125]], [[1500, 2000], [5.25, 4.125]]]
    again = tmp_path / "again.html"
    write_plot([first, second], to=again)
    assert again.read_text(encoding="utf-8") == page


def test_a_picture_is_1200_pixels_wide(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*steps(10), evaluation(10, 4.0)])
    write_plot([run / "metrics.jsonl"], to=tmp_path / "figures" / "run.png")
    with Image.open(tmp_path / "figures" / "run.png") as image:
        assert image.format == "PNG"
        assert image.width == 1200


def test_a_name_with_dollars_is_text_not_mathematics(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [*steps(10), evaluation(10, 4.0)]) for name in ("lr_$x^$_{}", "b$\\frac$")]
    for suffix in (".html", ".png"):
        write_plot(runs, to=tmp_path / f"plot{suffix}")
    assert "lr_$x^$_{}" in (tmp_path / "plot.html").read_text(encoding="utf-8")


def test_a_run_without_evaluations_is_plotted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps(1))
    write_plot([run], to=tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "Training loss" in page
    assert "Validation" not in page


def test_the_summary_says_how_far_a_run_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*steps(10), evaluation(10, 4.125)])
    assert summary(History(runs=[read_run(run)]))[1] == ["run", "10", "1,000", "0.8000", "4.1250", "4.1250", "–"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1477.8628, "1478"), (31.4159, "31.42"), (25.0, "25.00"), (65_536.4, "65536"), (math.inf, "inf")],
)
def test_a_perplexity_has_four_digits(value: float, shown: str) -> None:
    metrics = {"validation/loss/all": 7.29836, "validation/perplexity/all": value}
    assert validation_rows(metrics, title="run")[1] == ["all", "7.2984", shown, "–"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "no step was logged yet"),
        ('{"step": 1, "validation/loss/all": 2}\n', "no step was logged yet"),
        ('garbage\n{"step": 1, "time/token": 0}\n', "line 1 is no line of metrics: 'garbage'; remove it"),
    ],
)
def test_a_run_that_cannot_be_plotted_is_refused(
    content: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 1
    assert error in capsys.readouterr().err


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps(3))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "time/tok')
    assert read_run(run).last_step == 3


def test_a_line_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps(2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss/a\u2028b\x85c": 1}\n')
    assert read_run(run).rows[-1]["loss/a\u2028b\x85c"] == 1


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*steps(2), {"step": 2, "validation/loss/source/\ud800": 1}, *steps(1)])
    with pytest.raises(PlotError, match=r"metrics\.jsonl: line 3 is no line of metrics"):
        read_run(run)


def test_other_files_than_pages_and_pictures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps(3))
    assert main([str(run), "--to", str(tmp_path / "run.pdf")]) == 1
    assert "run.pdf: found suffix '.pdf', expected .html or .png" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 1
    assert "nothing: cannot be read (No such file or directory); give a run's save_folder" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_a_plot_replaces_a_link_and_does_not_follow_it(suffix: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps(3))
    (tmp_path / "elsewhere").write_text("kept")
    (run / f"plot.{suffix}").symlink_to(tmp_path / "elsewhere")
    write_plot([run], to=run / f"plot.{suffix}")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert not (run / f"plot.{suffix}").is_symlink()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps(3))
    assert main([str(run), "--to", str(run / "metrics.jsonl" / "plot.html")]) == 1
    assert "metrics.jsonl: this folder of the plot cannot be made or written to" in capsys.readouterr().err


def test_labels_do_not_overlap() -> None:
    marks = [(0, "stage1", True), (6000, "stage2, stage 0", True), (6600, "stage 1", False), (9000, "stage 2", False)]
    plot = Plot(title="", panels=[], end=10_000, marks=marks)
    assert [label for _, label, _ in labels_with_room(plot)] == ["stage1", "stage2, stage 0", "stage 2"]


def test_runs_are_compared_from_their_beginning(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path / "first", [*steps(10), evaluation(10, 4.0)]))
    second = read_run(write_run(tmp_path / "second", [evaluation(5, 5.0), evaluation(15, 4.0), *steps(20)]))
    plot = overlaid([first, second])
    loss = plot.panels[1]
    assert (plot.end, loss.title, [series.name for series in loss.series]) == (
        2000,
        "Validation loss",
        ["first", "second"],
    )
    assert [series.parts[0][0].tolist() for series in loss.series] == [[1000], [500, 1500]]
    assert len({series.color for series in loss.series}) == 2
    rows = differences([first, second])
    assert rows[0] == ["after 1,000 tokens", "first", "second", "second − first"]
    assert rows[1] == ["training loss", "0.8000", "0.8000", "+0.0000"]  # 8 / step, at step 10
    assert rows[2] == ["validation loss", "4.0000", "4.5000", "+0.5000"]  # half way from 5 to 4
    assert main([str(tmp_path / "first"), str(tmp_path / "second"), "--overlay"]) == 0
    assert "second − first" in (tmp_path / "second" / "plot.html").read_text(encoding="utf-8")
    write_plot([tmp_path / "first", tmp_path / "second"], to=tmp_path / "both.png", overlay=True)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / folder / "run", steps(3))) for folder in ("a", "b")]
    assert [series.name for series in overlaid(runs).panels[0].series] == ["run (1)", "run (2)"]


def test_a_value_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    rows = steps(3)
    rows[1]["loss/train/total"] = None
    run = write_run(tmp_path / "run", rows)
    assert consecutive(History(runs=[read_run(run)])).panels[0].title == "Training loss"
    write_plot([run], to=tmp_path / "run.html")
    assert "[8.0,null," in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_one_process_draws_a_plot_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps(3))
    with sole_writer(run / "plot.html", what="plot", remedy="wait", is_folder=False):
        assert main([str(run)]) == 1
    assert "plot.html: this plot is in use (by process " in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_a_file_that_is_no_plot_is_kept(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, to = write_run(tmp_path / "run", steps(3)), tmp_path / f"mine.{suffix}"
    for _ in range(2):  # an earlier plot is replaced
        assert main([str(run), "--to", str(to)]) == 0
    to.write_text("mine")
    assert main([str(run), "--to", str(to)]) == 1
    assert f"{to}: exists, and was not written by this command; move it away, or name" in capsys.readouterr().err
    assert to.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", to.name])
