"""Locations: what is local, what is in object storage, and what is refused without showing a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming_rwkv.config import ConfigError, load_config, validate
from streaming_rwkv.location import LocationError, checked_local, checked_location, is_remote
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.train.checkpoints.restore import local_checkpoint
from streaming_rwkv.train.config import RunConfig

SECRET = "wJalr/XUtn+FEMI"
WITH_SECRETS = [
    f"s3://AKIA:{SECRET}@bucket/x",
    f"S3://AKIA:{SECRET}@bucket/x",
    f"s3://AKIA:{SECRET.replace('/', '')}@bucket",
    f"s3://{SECRET.replace('/', '')}@bucket/x",
    f"sftp://u:{SECRET}@host/x",
    f"https://u:{SECRET.replace('/', '')}@host/x",
    f"https://bucket.example/x?X-Amz-Signature={SECRET}",
]
OTHER_SCHEMES = ["gs", "hf", "s3a", "abfs", "https", "sftp", "oci"]


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket/data", "s3://bucket/data"),
        ("S3://bucket/Data", "s3://bucket/Data"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/p@q/*?.jsonl", "s3://bucket/p@q/*?.jsonl"),
        ("/data/a b", "/data/a b"),
        ("data/x://y", "data/x://y"),
        ("C:relative", "C:relative"),
        ("~/data", "~/data"),
    ],
)
def test_paths_and_s3_are_locations(location: str, expected: str) -> None:
    assert checked_location(location) == expected
    assert is_remote(location) == expected.startswith("s3://")


@pytest.mark.parametrize("scheme", OTHER_SCHEMES)
def test_another_scheme_is_named_with_what_is_supported(scheme: str) -> None:
    for check in (checked_location, is_remote, checked_local):
        with pytest.raises(
            LocationError, match=f"{scheme}://bucket/x: scheme '{scheme}' is not supported; give a local"
        ):
            check(f"{scheme}://bucket/x")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///data", "file:///data: write a local path without file://"),
        ("s3:/bucket/x", "s3:/bucket/x: not a location; write s3://bucket/prefix"),
        (Path("S3://bucket/x"), "S3:/bucket/x: not a location; write s3://bucket/prefix"),
        ("s3:///x", "s3:///x: not a place in object storage; write s3://bucket/prefix"),
        ("s3://buck et/x", "s3://buck et/x: not a place in object storage"),
        ("s3://bucket?x=1/y", "s3://…: not a place in object storage"),
        ("x" * 256, "…: a path of 256 characters cannot be found here; give"),
        ("x/" * 2100, "…: a path of 4,200 characters cannot be found here; give"),
        (5, "found 5, expected text or a Path"),
        (None, "found None, expected text or a Path"),
        (b"data", "found b'data', expected text or a Path"),
    ],
)
def test_a_mistyped_location_is_refused(location: str | Path, message: str) -> None:
    with pytest.raises(LocationError) as raised:
        checked_location(location)
    assert message in str(raised.value)


def test_a_remote_location_is_refused_where_a_path_is_meant() -> None:
    with pytest.raises(LocationError, match=r"found 's3://b/x', expected a local path; copy it"):
        checked_local("S3://b/x", remedy="copy it")
    assert checked_local("x/y") == "x/y"


def run_config(**values: object) -> RunConfig:
    given: dict[str, object] = {
        "save_folder": "runs/a",
        "data": {"path": "data", "stages": [{"tokens": 1}], "batch_packs": 1},
        "model": {"hidden_size": 64, "num_layers": 1},
    }
    for key, value in values.items():
        first, _, second = key.partition("__")
        inner = given.get(first)
        given[first] = {**inner, second: value} if isinstance(inner, dict) else value
    return validate(RunConfig, given, where="run.yaml")


SETTINGS = ["save_folder", "save_remote", "data__path", "data__cache", "model__init_from"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_a_run_name_file_key_and_scheme(setting: str) -> None:
    with pytest.raises(ConfigError) as raised:
        run_config(**{setting: "gs://bucket/x"})
    assert str(raised.value).startswith(
        f"run.yaml: {setting.replace('__', '.')}: gs://bucket/x: scheme 'gs' is not supported"
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("location", WITH_SECRETS)
def test_settings_of_a_run_never_show_a_secret(setting: str, location: str) -> None:
    for value in (location, [location]):
        with pytest.raises(ConfigError) as raised:
            run_config(**{setting: value})
        assert "wJalr" not in str(raised.value)
        assert "FEMI" not in str(raised.value)


def test_a_save_folder_in_object_storage_points_to_save_remote() -> None:
    with pytest.raises(
        ConfigError, match=r"run.yaml: save_folder: found 's3://b/run', expected a local path; .*`save_re"
    ):
        run_config(save_folder="s3://b/run")
    config = run_config(save_remote="S3://b/run", data__path="S3://b/set")
    assert (config.save_remote, config.data.path) == ("s3://b/run", "s3://b/set")


@pytest.mark.parametrize("location", ["gs://bucket/x", *WITH_SECRETS])
def test_checkpoints_tokenizers_and_configurations_refuse_it_too(location: str) -> None:
    for use in (lambda: local_checkpoint(location).__enter__(), lambda: load_tokenizer(location)):
        with pytest.raises(LocationError) as raised:
            use()
        assert "wJalr" not in str(raised.value)
    with pytest.raises(ConfigError, match="configurations are read from local files") as refused:
        load_config(RunConfig, location)
    assert "wJalr" not in str(refused.value)


@pytest.mark.parametrize("override", [WITH_SECRETS[0], f"data.path.x.0={WITH_SECRETS[0]}", f"x=[{WITH_SECRETS[0]}"])
def test_overrides_that_cannot_be_used_show_no_secret(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text("data: [1]\n")
    with pytest.raises(ConfigError) as raised:
        load_config(RunConfig, tmp_path / "run.yaml", overrides=[override])
    assert "FEMI" not in str(raised.value)
