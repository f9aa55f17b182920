"""Discovery of a source's files, and their names."""

from __future__ import annotations

import glob
import os
import re
import socket

import pytest

from prep.inputs.discovery import _glob_pattern, find_files
from prep.inputs.files import InputFile, opened
from streaming_rwkv.config import UserError


def names(root, *paths):
    return [file.name for file in find_files("s", [str(root / path) for path in paths])]


@pytest.fixture
def tree(tmp_path):
    for name in ("a/1.jsonl", "a/deep/er/2.parquet", "a/deep/3.json.gz", "b/1.jsonl.zst", "a/notes.md", "a/.x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    return tmp_path


def test_folders_are_searched_at_any_depth(tree):
    assert names(tree, "a") == ["1.jsonl", "deep/3.json.gz", "deep/er/2.parquet"]


def test_files_are_found_in_one_order_however_they_are_given(tree):
    assert names(tree, "b", "a") == names(tree, "a", "b")
    assert names(tree, "a", "b") == ["a/1.jsonl", "a/deep/3.json.gz", "a/deep/er/2.parquet", "b/1.jsonl.zst"]


def test_a_single_file_has_its_own_name(tree):
    assert names(tree, "a/deep/3.json.gz") == ["3.json.gz"]


def test_globs_choose_files(tree):
    assert names(tree, "a/**/*.json.gz") == ["3.json.gz"]
    assert names(tree, "*/1.*") == ["a/1.jsonl", "b/1.jsonl.zst"]


def test_a_file_given_twice_is_found_once(tree):
    assert names(tree, "a", "a/1.jsonl") == ["1.jsonl", "deep/3.json.gz", "deep/er/2.parquet"]


def test_moving_a_corpus_changes_no_name(tree, tmp_path):
    before = names(tree, "a")
    (tree / "a").rename(tree / "elsewhere")
    assert names(tree, "elsewhere") == before


def test_a_file_has_its_size_and_suffix(tree):
    (file,) = find_files("s", [str(tree / "a/deep/3.json.gz")])
    assert (file.size, file.suffix, file.source) == (len("a/deep/3.json.gz"), ".json.gz", "s")
    with opened(file) as stream:
        assert stream.read() == b"x" * file.size


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "sources.s: .*nowhere: no such file or folder"),
        ("a/notes.md", r"sources.s: .*notes\.md: cannot be read; files must end in \.parquet, \.jsonl"),
        ("empty", "sources.s: no file to read below"),
        ("a/*.txt", "sources.s: no file to read below"),
    ],
)
def test_a_missing_path_is_named_with_its_source(tree, path, message):
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_files("s", [str(tree / path)])


def test_a_pattern_finds_what_can_be_read_and_a_name_must_be_readable(tree):
    (tree / "a" / "_partial.jsonl").write_bytes(b"")
    assert names(tree, "a/*") == names(tree, "a")
    assert names(tree, "a/_partial.jsonl") == ["_partial.jsonl"]


def test_a_name_with_brackets_is_no_pattern(tree):
    (tree / "b").rename(tree / "b [1]")
    assert names(tree, "b [1]") == ["1.jsonl.zst"]


def test_a_path_with_a_trailing_slash_is_the_same_folder(tree):
    assert [file.name for file in find_files("s", [f"{tree}/a/"])] == names(tree, "a")
    assert [file.name for file in find_files("s", [f"{tree}/a", f"{tree}//b/../a"])] == names(tree, "a")


def test_each_path_must_have_something_to_read(tree):
    with pytest.raises(UserError, match=r"sources\.s: no file to read below .*/b/\*\.jsnl"):
        names(tree, "a", "b/*.jsnl")


def test_a_link_to_a_folder_above_is_not_followed_and_any_other_is(tree):
    (tree / "a" / "loop").symlink_to(tree / "a")
    (tree / "a" / "deep" / "up").symlink_to("..")
    (tree / "a" / "other").symlink_to(tree / "b")
    assert names(tree, "a") == ["1.jsonl", "deep/3.json.gz", "deep/er/2.parquet", "other/1.jsonl.zst"]


def test_a_link_to_a_folder_above_is_refused_below_two_stars(tree):
    for name in "xyz":  # 3 ** 40 paths
        (tree / "a" / "deep" / name).symlink_to(".")
    with pytest.raises(
        UserError, match=r"a/\*\*/\*\.jsonl: `\*\*` never ends at .*/a/deep/[xyz], a link to .*/a/deep,"
    ):
        names(tree, "a/**/*.jsonl")
    assert names(tree, "a/*.jsonl") == names(tree, "a/**.jsonl") == ["1.jsonl"]  # which go down no further


def test_a_link_to_nothing_is_an_error(tree):
    (tree / "a" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"a/gone\.jsonl: cannot be read \(No such file or directory\)"):
        names(tree, "a")


def test_a_file_that_may_not_be_opened_is_an_error(tree):
    file = InputFile(source="s", name="deep", path=str(tree / "a" / "deep"), size=0, changed_ns=0)
    with pytest.raises(UserError, match=r"a/deep: cannot be opened \(Is a directory\)"), opened(file):
        pass


@pytest.mark.parametrize(
    "pattern",
    ["*", "a/*", "a/**/*.json.gz", "**/*.jsonl", "**/1.*", "?/1.jsonl", "[ab]/*.jsonl", "[!a]/*", "a/**", "a+/x"],
)
def test_globs_in_a_bucket_are_those_of_a_folder(tree, pattern):
    (tree / "top.jsonl").write_bytes(b"")
    files = [os.path.relpath(f"{folder}/{name}", tree) for folder, _, found in os.walk(tree) for name in found]
    visible = [file for file in files if "/." not in f"/{file}"]
    expected = [path for path in glob.glob(pattern, root_dir=tree, recursive=True) if (tree / path).is_file()]
    assert sorted(file for file in visible if re.fullmatch(_glob_pattern(pattern), file)) == sorted(expected)


def test_a_glob_in_a_bucket_that_is_no_pattern_is_named():
    with pytest.raises(UserError, match=r"sources\.s: s3://bucket/\[z-a\]\.jsonl: not a pattern \(bad character range"):
        find_files("s", ["s3://bucket/[z-a].jsonl"])


def test_a_file_that_changes_between_listing_and_the_end_is_an_error(tree):
    (file,) = find_files("s", [str(tree / "b")])
    changed = (
        r"b/1\.jsonl\.zst: has changed since it was listed: 13 bytes then, 14 now; wait until no program writes to it"
    )
    with pytest.raises(UserError, match=changed), opened(file) as stream:  # noqa: PT012  # at the end of the block
        assert stream.read() == b"x" * 13
        with open(file.path, "ab") as more:
            more.write(b"x")
    with pytest.raises(UserError, match=changed), opened(file):
        raise AssertionError("never read")


def test_two_stars_find_each_file_once(tree):
    assert names(tree, "a/**") == names(tree, "a")


def test_a_file_with_several_links_is_found_once(tree):
    (tree / "a" / "again.jsonl").symlink_to("1.jsonl")
    (tree / "a" / "to_b").symlink_to("../b")
    (tree / "b" / "to_a").symlink_to("../a")
    expected = ["1.jsonl", "deep/3.json.gz", "deep/er/2.parquet", "to_b/1.jsonl.zst"]
    assert names(tree, "a") == expected
    (tree / "again").symlink_to("a")
    assert names(tree, "a", "again") == [f"a/{name}" for name in expected]


def test_a_folder_with_brackets_gives_names_as_any_other(tree):
    (tree / "a").rename(tree / "a [1]")
    assert names(tree, "a [1]") == ["1.jsonl", "deep/3.json.gz", "deep/er/2.parquet"]
    (tree / "a [1]" / "1.jsonl").unlink()
    assert names(tree, "a [1]") == ["deep/3.json.gz", "deep/er/2.parquet"]


def test_a_name_that_is_not_utf8_is_an_error(tree):
    (tree / os.fsdecode("文.jsonl".encode("gbk"))).write_bytes(b"")
    with pytest.raises(UserError, match=r"\\xce\\xc4\.jsonl': its name is not UTF-8"):
        names(tree, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tree):
    (tree / "a" / "deep").chmod(0)
    with pytest.raises(UserError, match=r"a/deep: cannot be read \(Permission denied\)"):
        names(tree, "a")


def not_read(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "prep.inputs.discovery"]


def write(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")


def test_suffixes_are_read_in_any_case_and_other_files_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    read = ["A.JSONL", "b.ndjson", "c.Json", "d.jsonlines", "e.jsonl.GZ", "f.jsonl.xz", "g.json.bz2", "h.Parquet"]
    write(tmp_path, *read, "1.txt", "2.TXT", "3.csv.gz", "README", "deep/4.txt", "_SUCCESS", "_x.jsonl", ".hidden")
    assert names(tmp_path, "") == read
    (line,) = not_read(caplog)
    counts, _, expected = line.removeprefix("sources.s: not read: ").partition("; ")
    assert counts == "3 .txt, 2 beginning with '_', 1 .csv.gz, 1 without an ending"
    assert expected == (
        "files must end in .parquet, .jsonl, .ndjson, .jsonlines or .json, all but the first also with .gz, .zst, "
        ".bz2 or .xz"
    )


def test_a_log_line_counts_each_file_once_and_names_few_suffixes(tree, caplog):
    caplog.set_level("INFO")
    write(tree, *(f"a/{number}.{number}" for number in range(10)), "a/_named.jsonl")
    names(tree, "a", "a/*", "a/_named.jsonl")
    (line,) = not_read(caplog)
    assert line.count("1 .") == 8
    assert ", 3 others; files must end in" in line  # notes.md is one of eleven


def test_an_unusual_suffix_is_not_printed(tmp_path, caplog):
    caplog.set_level("INFO")
    write(
        tmp_path, "a.jsonl", "b.\x1b[2J", "c.1 sentence and more", os.fsdecode(b"d.\xff"), "e.parquet.tmp-12345678901"
    )
    names(tmp_path, "")
    assert "not read: 4 with another ending; " in not_read(caplog)[0]


def test_nothing_is_logged_if_all_files_are_read(tree, caplog):
    caplog.set_level("INFO")
    names(tree, "b")
    assert not_read(caplog) == []


def test_a_folder_without_files_to_read_is_named_with_its_suffixes(tmp_path):
    write(tmp_path, "a.txt", "b.txt")
    with pytest.raises(UserError, match=r"no file to read below .* \(it has 2 \.txt\); .*docs/preparation\.md shows"):
        names(tmp_path, "")


def test_folders_with_an_underscore_are_skipped_unless_they_are_partitions(tmp_path, caplog):
    caplog.set_level("INFO")
    read = ["_year=2024/a.jsonl", "part-0.jsonl"]
    write(tmp_path, *read, "_temporary/0/part-0.jsonl", "_delta_log/0.json", "x/_spark/1.jsonl", ".git/2.json")
    assert names(tmp_path, "") == read
    assert "not read: 3 beginning with '_'; " in not_read(caplog)[0]
    assert names(tmp_path, "**/*.json*") == read
    assert names(tmp_path, "*") == read
    assert names(tmp_path, "_temporary") == ["0/part-0.jsonl"]
    assert names(tmp_path, "_temp*") == ["part-0.jsonl"]
    assert names(tmp_path, "_temporary/*/*.jsonl") == ["part-0.jsonl"]
    assert names(tmp_path, "*/_spark/*.jsonl") == ["1.jsonl"]


def test_only_regular_files_are_opened(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "d.jsonl"))
        assert names(tmp_path, "") == ["a.jsonl"]
        assert names(tmp_path, "*.jsonl") == ["a.jsonl"]
    assert "not read: 3 named pipe, socket or device; " in not_read(caplog)[0]
    for name in ("b.jsonl", "c.jsonl"):
        with pytest.raises(UserError, match=rf"{name}: is a named pipe, socket or device; expected a file"):
            names(tmp_path, name)


def test_a_pipe_that_replaces_a_file_is_refused_without_blocking(tree):
    (file,) = find_files("s", [str(tree / "b")])
    os.unlink(file.path)
    os.mkfifo(file.path)
    with pytest.raises(UserError, match=r"1\.jsonl\.zst: was replaced by a named pipe, socket or device"), opened(file):
        raise AssertionError("never read")
