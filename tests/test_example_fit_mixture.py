"""examples/fit_mixture.py: a planted optimum is found, noise is not taken for one, and limits are kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from streaming_rwkv import UserError
from streaming_rwkv.filesystem import temporary_path
from tests.example_modules import example

fit_mixture = example("fit_mixture")

NATURAL = {"web": 0.7, "code": 0.2, "papers": 0.1}
SETS = ["code", "papers", "web"]
# Bits per byte: floor + exp(level - slopes · shares), mostly by a source's own share and a little by the others'.
FLOORS = np.array([0.35, 0.6, 0.7])
LEVELS = np.array([-0.2, -0.4, -0.5])
SLOPES = np.array([[0.2, 3.0, 0.2], [0.5, 0.3, 4.0], [1.5, 0.1, 0.3]])
WEIGHTS = np.array([0.25, 0.2, 0.55])


def true_bits(shares: np.ndarray) -> np.ndarray:
    return FLOORS + np.exp(LEVELS - shares @ SLOPES.T)


def planted_optimum() -> np.ndarray:
    """The best mixture of a grid of hundredths."""
    grid = np.array([[i, j, 100 - i - j] for i in range(101) for j in range(101 - i)]) / 100
    return grid[(true_bits(grid) @ WEIGHTS).argmin()]


def sampled(count: int = 24, *, concentration: float = 2.0) -> np.ndarray:
    mixtures = fit_mixture.sample_mixtures(NATURAL, count=count, seed=17, concentration=concentration)
    shares = np.array([list(mixture.values()) for mixture in mixtures])
    return shares / shares.sum(1, keepdims=True)


def noise(shares: np.ndarray, *, seed: int, deviation: float = 0.002) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, deviation, (len(shares), len(SETS)))


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_optimum_is_found(seed: int) -> None:
    shares = sampled()
    fit = fit_mixture.fit_mixture(shares, true_bits(shares) + noise(shares, seed=seed), WEIGHTS)
    assert fit.error < 0.2 * fit.spread
    # The optimum is flat: with noise of 0.002 a share is known to a few hundredths, its bits to less than the noise.
    assert np.abs(fit.proposal - planted_optimum()).max() < 0.06
    at = [float(true_bits(mixture) @ WEIGHTS) for mixture in (planted_optimum(), fit.proposal, shares[0])]
    assert at[0] - 1e-4 <= at[1] < at[0] + 0.001 < at[2] - 0.005


def test_the_minimum_is_that_of_the_laws() -> None:
    """Against a grid of the fitted laws: what is left is the search, which is convex."""
    shares = sampled()
    fit = fit_mixture.fit_mixture(shares, true_bits(shares) + noise(shares, seed=0), WEIGHTS)
    grid = np.array([[i, j, 200 - i - j] for i in range(201) for j in range(201 - i)]) / 200
    grid = grid[((grid >= shares.min(0)) & (grid <= shares.max(0))).all(1)]
    values = WEIGHTS @ [law.bits(grid) for law in fit.laws]
    assert np.abs(fit.proposal - grid[values.argmin()]).max() <= 0.006  # the grid's step
    assert WEIGHTS @ [law.bits(fit.proposal) for law in fit.laws] <= values.min() + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_reason_for_a_proposal(seed: int) -> None:
    shares = sampled()
    fit = fit_mixture.fit_mixture(shares, np.ones((len(shares), 3)) + noise(shares, seed=seed), WEIGHTS)
    assert fit.proposal is None


def test_equal_results_are_no_reason_for_a_proposal() -> None:
    shares = sampled()
    assert fit_mixture.fit_mixture(shares, np.ones((len(shares), 3)), WEIGHTS).proposal is None


def test_a_proposal_stays_within_what_was_tried_and_what_there_is() -> None:
    shares = sampled(concentration=40.0)  # all of them near the natural mixture
    bits = true_bits(shares)
    free = fit_mixture.fit_mixture(shares, bits, WEIGHTS).proposal
    assert (free <= shares.max(0) + 1e-9).all()
    assert free[0] == pytest.approx(shares[:, 0].min())  # the optimum has still less of the web
    limited = fit_mixture.fit_mixture(shares, bits, WEIGHTS, capacity=np.array([1.0, 0.21, 0.05])).proposal
    assert limited[1] <= 0.21 + 1e-9
    assert limited[2] <= 0.1 + 1e-9  # the natural share, which the capacity does not reach
    assert limited.sum() == pytest.approx(1)


def test_projection_is_the_nearest_mixture() -> None:
    project, zeros, ones = fit_mixture.project, np.zeros(3), np.ones(3)
    assert project(np.array([0.5, 0.4, 0.4]), zeros, ones) == pytest.approx([0.4, 0.3, 0.3])
    assert project(np.array([2.0, 0.1, 0.0]), zeros, ones) == pytest.approx([1.0, 0.0, 0.0])
    assert project(np.array([2.0, 0.1, 0.0]), zeros, np.array([0.5, 1, 1])) == pytest.approx([0.5, 0.3, 0.2])


def test_samples_begin_with_the_natural_mixture_and_are_only_added_to() -> None:
    few, many = (fit_mixture.sample_mixtures(NATURAL, count=n, seed=1, concentration=4.0) for n in (4, 9))
    assert many[0] == NATURAL
    assert many[:4] == few
    assert np.array([list(mixture.values()) for mixture in many]).sum(1) == pytest.approx(1, abs=2e-4)  # rounded


def test_reports_show_what_was_predicted_and_propose_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares, sources = sampled(), list(NATURAL)
    for bits, has_proposal in ((true_bits(shares), True), (np.ones((len(shares), 3)), False)):
        bits = bits + noise(shares, seed=1)
        capacity = np.array([10.0, 10.0, 10.0])
        fit = fit_mixture.fit_mixture(shares, bits, WEIGHTS, capacity=capacity)
        fit_mixture.report(fit, shares, bits, WEIGHTS, sources=sources, sets=SETS)
        file = tmp_path / "proposal.yaml"
        fit_mixture.propose(fit, shares, WEIGHTS, sources=sources, capacity=capacity, file=file)
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split() for line in lines]
        (natural,) = (row for row in rows if row[:1] == ["natural"])
        assert natural[1:5] == ["0.700", "0.200", "0.100", f"{bits[0] @ WEIGHTS:.4f}"]
        assert [row[0] for row in rows if row and row[0] in [*SETS, "weighted"]][-4:] == [*SETS, "weighted"]
        assert file.exists() == has_proposal
        if has_proposal:
            (stage,) = yaml.safe_load(file.read_text())["data"]["stages"]
            assert list(stage["sources"].values()) == pytest.approx(list(fit.proposal), abs=1e-4)
        else:  # the file of the fit before is gone
            assert lines[-1].startswith("no proposal: the error on proxies left out, 0.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web", "--weights: found 'web', expected NAME=NUMBER,…"),
        ("web=x", "--weights: found 'web=x', expected NAME=NUMBER,…"),
        ("books=1", "--weights: found 'books=1'; give weights of 0 or more for code, papers, web, each once"),
        ("web=-1", "--weights: found 'web=-1'; give weights of 0 or more"),
        ("web=0", "--weights: found 'web=0'; give weights"),
        ("web=nan", "--weights: found 'web=nan'; give weights"),
        ("web=1,web=2", "--weights: found 'web=1,web=2'; give weights"),
        ("web=1e308,code=1e308", "--weights: found 'web=1e308,code=1e308'; give weights"),
    ],
)
def test_weights_are_checked(text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        fit_mixture.parse_weights(text, SETS)
    assert str(raised.value).startswith(message)


def test_weights_add_up_to_one() -> None:
    assert fit_mixture.parse_weights("web=1,code=3", SETS).tolist() == [0.75, 0.0, 0.25]
    assert fit_mixture.parse_weights(None, SETS).tolist() == pytest.approx([1 / 3] * 3)


@pytest.fixture
def proxy_yaml(tmp_path: Path, write_data_set: Callable[..., Path]) -> Path:
    data = write_data_set(
        tmp_path / "data",
        {("web", 1, 16): 6, ("web", 17, 32): 6, ("code", 1, 16): 4},
        validation={("web", 1, 16): 2, ("code", 1, 16): 2},
    )
    settings = {
        "save_folder": "unused", "data": {"path": str(data), "batch_packs": 2, "stages": [{"tokens": 500}]},
        "model": {"hidden_size": 64, "num_layers": 1},
    }  # fmt: skip
    (tmp_path / "proxy.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "proxy.yaml"


def test_commands_differ_by_mixture_and_folder(
    proxy_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(proxy_yaml), str(tmp_path / "proxies"), "seed=5", "--proxies", "4", "--show"]
    assert fit_mixture.main([*arguments, "data.stages.0.max_length=16", "--processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "/proxies/proxy-00 " in lines[0]
    assert "/proxies/proxy-03 " in lines[3]
    assert all(f"data.cache={tmp_path}/proxies/cache" in line for line in lines)
    assert all(line.endswith("--processes 2") for line in lines)
    sources = [line.partition("data.stages.0.sources=")[2].partition("}")[0] for line in lines]
    assert len(set(sources)) == 4
    assert sources[0].startswith('{"web": 0.') or sources[0].startswith('{"code": 0.')


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--proxies=3", "give --proxies of 4 to 1,000, and a --concentration of 0.1 to 10,000"),
        ("--proxies=500000000", "give --proxies of 4 to 1,000"),
        ("--concentration=inf", "a --concentration of 0.1 to 10,000"),
        ("--concentration=nan", "a --concentration of 0.1 to 10,000"),
        ("--concentration=1e308", "a --concentration of 0.1 to 10,000"),
        ("--concentration=1e-320", "a --concentration of 0.1 to 10,000"),
        ("--seed=-1", "give a --seed of 0 or more, and --processes of 1 or more"),
        ("--processes=0", "give a --seed of 0 or more, and --processes of 1 or more"),
        ("--weights=nope=1", "--weights: found 'nope=1'; give weights of 0 or more for code, web"),
        ("--concentration=0", "a --concentration of 0.1 to 10,000"),
        ("data.stages=[{passes: 1}]", "data.stages: a proxy has one stage, with a length in `tokens`"),
        ("data.stages.0.temperature=2", "data.stages: a proxy has one stage, with a length in `tokens`"),
        ("data.stages.0.min_length=17", "data: has 1 sources within the lengths"),
    ],
)
def test_a_yaml_that_is_no_proxys_is_refused(
    proxy_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert fit_mixture.main([str(proxy_yaml), str(tmp_path / "proxies"), override, "--show"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "proxies").exists()


def test_proxies_of_other_settings_are_not_fitted_together(tmp_path: Path) -> None:
    file = tmp_path / "proxies" / "proxies.yaml"
    fit_mixture.check_same_proxies(file, {"seed": 17, "data": "abc"})
    fit_mixture.check_same_proxies(file, {"seed": 17, "data": "abc"})
    with pytest.raises(UserError, match=r"proxies\.yaml: .* with other settings \(- seed: 17; \+ seed: 18\)"):
        fit_mixture.check_same_proxies(file, {"seed": 18, "data": "abc"})


def test_a_damaged_settings_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "proxies.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match=r"proxies\.yaml: is damaged"):
        fit_mixture.check_same_proxies(tmp_path / "proxies.yaml", {"seed": 17})


@pytest.mark.parametrize("concentration", fit_mixture.CONCENTRATIONS)
def test_samples_of_any_concentration_are_mixtures_and_differ(concentration: float) -> None:
    mixtures = fit_mixture.sample_mixtures(NATURAL, count=24, seed=17, concentration=concentration)
    shares = np.array([list(mixture.values()) for mixture in mixtures])
    assert shares.sum(1) == pytest.approx(1, abs=2e-4)  # rounded
    assert len(np.unique(shares, axis=0)) >= 8


@pytest.fixture
def proxies(proxy_yaml: Path, tmp_path: Path) -> fit_mixture.Proxies:
    (tmp_path / "proxy-01").mkdir()
    config = fit_mixture.load_config(fit_mixture.RunConfig, proxy_yaml)
    return fit_mixture.Proxies(yaml="", overrides=[], processes=1, config=config, folder=tmp_path, sets=["web"])


def test_a_result_of_another_mixture_is_refused(proxies: fit_mixture.Proxies, tmp_path: Path) -> None:
    (tmp_path / "proxy-01" / "result.json").write_text('{"sources": {"web": 1.0}, "bits_per_byte": {"web": 1.5}}')
    assert proxies.bits_per_byte(0, {"web": 1.0}) is None
    assert proxies.bits_per_byte(1, {"web": 1.0}) == {"web": 1.5}
    with pytest.raises(UserError, match=r"result\.json: found \{'web': 1\.0\}, expected \{'web': 0\.5\}"):
        proxies.bits_per_byte(1, {"web": 0.5})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1]",
        b'{"sources": {"web": 1.0}}',
        b'{"sources": {"web": 1.0}, "bits_per_byte": 1.5}',
        b'{"sources": {"web": 1.0}, "bits_per_byte": {"code": 1.5}}',
        b'{"sources": {"web": 1.0}, "bits_per_byte": {"web": "1.5"}}',
        b'{"sources": {"web": 1.0}, "bits_per_byte": {"web": -1.5}}',
        b'{"sources": {"web": 1.0}, "bits_per_byte": {"web": NaN}}',
    ],
)
def test_a_damaged_result_is_refused(proxies: fit_mixture.Proxies, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "proxy-01" / "result.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"proxy-01/result\.json: found .*; remove .*/proxy-01 to train this proxy again"
    ):
        proxies.bits_per_byte(1, {"web": 1.0})


@pytest.mark.parametrize("last", [b"\xff", b"{", b"1", b'{"step": 9, "validation/bits_per_byte/source/web": null}'])
def test_damaged_metrics_and_numbers_that_are_not_finite_are_refused(
    proxies: fit_mixture.Proxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    monkeypatch.setattr(fit_mixture, "_wait_for", lambda command: 0)
    good = b'{"step": 8, "validation/bits_per_byte/source/web": 1.5}\n{"step": 9}\n'
    (tmp_path / "proxy-01" / "metrics.jsonl").write_bytes(good + last)
    with pytest.raises(UserError, match=r"proxy-01/metrics\.jsonl: found "):
        proxies.train(1, {"web": 1.0})
    (tmp_path / "proxy-01" / "metrics.jsonl").write_bytes(good)
    assert proxies.train(1, {"web": 1.0}) == proxies.bits_per_byte(1, {"web": 1.0}) == {"web": 1.5}


def test_files_are_not_written_through_links(tmp_path: Path) -> None:
    file, other = tmp_path / "proxies.yaml", tmp_path / "other"
    other.write_text("kept")
    for path in (file, tmp_path / "proxies.yaml.new", temporary_path(file)):
        path.symlink_to(other)
    fit_mixture._write(file, "new")
    assert file.read_text() == "new\n"
    assert not file.is_symlink()
    assert other.read_text() == "kept"


KILLED = """
import sys
from tests.example_modules import example
child = "import time; print('ready', flush=True); time.sleep(600)"
example("fit_mixture")._wait_for([sys.executable, "-c", child])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_proxy_ends_with_a_program_that_was_killed() -> None:
    program = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE)
    assert program.stdout is not None
    with program.stdout:
        assert program.stdout.readline() == b"ready\n"
        (proxy,) = psutil.Process(program.pid).children()
        program.kill()
        program.wait()
        try:
            assert program.stdout.read() == b""  # which ends with the last process that has it open
        finally:
            if proxy.is_running():
                proxy.kill()


def test_a_proxy_is_asked_to_stop_and_the_handlers_before_return() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    child = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    assert fit_mixture._wait_for([sys.executable, "-c", child]) == -signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
