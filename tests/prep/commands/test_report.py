"""The report's page and numbers."""

from __future__ import annotations

import html.parser
import json
import os

import pytest

from prep.build import build
from prep.commands.report import write_report
from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import sole_writer
from streaming_rwkv.shards import DataError

NO_END_TAG = {"meta"}


class Checker(html.parser.HTMLParser):
    """Check that every tag is closed and that nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.data = ""
        self.is_data = False

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href", "srcset"} & {name for name, _ in attributes}
        assert tag not in {"link", "iframe", "img"}
        self.is_data = ("id", "data") in attributes
        if tag not in NO_END_TAG:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.is_data and self.open[-1] == "script":
            self.data += data


@pytest.fixture
def finished(config, write_lines, tmp_path):
    texts = [f"<b>number</b> {number} " + "0123456789" * (number % 60) for number in range(80)]
    write_lines(tmp_path / "corpus" / "a.jsonl", [*texts, texts[0]])
    with (tmp_path / "corpus" / "a.jsonl").open("ab") as file:
        file.write(b'{"text": 5}\n')
    return build(config(validation=0.2)).manifest


def test_the_page_is_complete_and_self_contained(finished, tmp_path):
    page = write_report(tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    assert not checker.open
    text = "".join(checker.text)
    data = json.loads(checker.data)
    assert all(sample["text"].startswith("<b>number</b>") for sample in data["samples"])  # scripts show it as text
    first = data["samples"][0]
    assert (first["source"], first["begins"], first["ends"]) == ("corpus", True, True)
    assert first["shard"].startswith("train/corpus/1-256/shard.00000")
    assert data["figures"]["counts"]["corpus"]["rejected"] == {"'text' is not a string": 1}
    assert "80" in text


def test_the_figures_are_the_manifests(finished, tmp_path):
    write_report(tmp_path / "out", to=tmp_path / "elsewhere")
    figures = json.loads((tmp_path / "elsewhere" / "report.json").read_text(encoding="utf-8"))
    assert figures["fingerprint"] == finished.fingerprint
    assert figures["totals"]["tokens"] == sum(stream.targets for stream in finished.streams)
    assert figures["totals"]["documents"] == 80
    assert figures["totals"]["documents_read"] == 82
    assert sum(figures["lengths"]["corpus"].values()) == 81  # before deduplication
    assert sum(figures["fill"].values()) == figures["totals"]["packs"]
    assert figures["counts"]["corpus"]["rejected"] == {"'text' is not a string": 1}


def test_a_report_without_a_data_set_or_its_statistics_is_refused(finished, tmp_path):
    with pytest.raises(DataError, match="no finished data set"):
        write_report(tmp_path)
    (tmp_path / "out" / "statistics.json").unlink()
    with pytest.raises(DataError, match=r"statistics\.json: missing; copy it"):
        write_report(tmp_path / "out")
    os.mkfifo(tmp_path / "out" / "statistics.json")
    with pytest.raises(DataError, match=r"statistics\.json: not a regular file"):
        write_report(tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_named_with_the_option(finished, tmp_path):
    with pytest.raises(
        UserError, match=r"corpus/a\.jsonl: this folder of the report .*File exists.* with `--to FOLDER`"
    ):
        write_report(tmp_path / "out", to=tmp_path / "corpus" / "a.jsonl")


def test_a_text_cannot_end_the_script(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["</script><img src=x onerror=alert(1)>"] * 2)
    build(config())
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "<img" not in page
    checker = Checker()
    checker.feed(page)
    assert json.loads(checker.data)["samples"][0]["text"] == "</script><img src=x onerror=alert(1)>"


def test_a_report_replaces_links_and_does_not_follow_them(finished, tmp_path):
    other = tmp_path / "other"
    other.write_text("of another program")
    for name in ("report.json", "report.html"):
        (tmp_path / "out" / name).symlink_to(other)
    write_report(tmp_path / "out")
    assert other.read_text() == "of another program"
    assert json.loads((tmp_path / "out" / "report.json").read_text())
    assert not (tmp_path / "out" / "report.html").is_symlink()


def test_statistics_that_are_too_large_are_not_read(finished, tmp_path):
    with open(tmp_path / "out" / "statistics.json", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(DataError, match=r"statistics\.json: found 1,073,741,825 bytes, expected a regular file"):
        write_report(tmp_path / "out")


def test_one_process_writes_a_report_at_a_time(finished, tmp_path):
    to = tmp_path / "report"
    with (
        sole_writer(to, what="folder of the report", remedy="wait"),
        pytest.raises(UserError, match=r"report: this folder of the report is in use \(by process \d+\)"),
    ):
        write_report(tmp_path / "out", to=to)
    assert list(to.iterdir()) == []


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_file_that_is_no_report_is_kept(finished, tmp_path, name):
    to = tmp_path / "to"
    for _ in range(2):  # what a report wrote is replaced
        write_report(tmp_path / "out", to=to)
    (to / name).write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in to.iterdir()}
    with pytest.raises(UserError) as caught:
        write_report(tmp_path / "out", to=to)
    assert str(caught.value) == (
        f"{to / name}: exists, and was not written by this command; move it away, or name another with `--to FOLDER`"
    )
    assert {path: path.read_bytes() for path in to.iterdir()} == before


def test_a_report_is_not_written_among_the_files_of_a_data_set(finished, tmp_path):
    with pytest.raises(UserError, match=r"would be in .*/out, which is a data set; name another with `--to FOLDER`"):
        write_report(tmp_path / "out", to=tmp_path / "out" / "train" / "report")
    assert not (tmp_path / "out" / "train" / "report").exists()
