"""Propose a mixture of sources by small runs: sample mixtures, train on each, fit bits per byte against shares.

    python examples/fit_mixture.py proxy.yaml runs/proxies --proxies 24 data.path=DATA_SET

The YAML is that of one small run, with one stage in `tokens`. The first proxy trains on the natural mixture, the others
on samples of a Dirichlet distribution round it. The same command resumes: a finished proxy is not run again, and a
larger --proxies adds some. Everything else is the same in all of them, the seed too, so they differ by the mixture.

The law of one validation set is that of "Data Mixing Laws" (Ye et al., 2024): bits(r) = floor + exp(level + slopes · r)
for shares r. For a given floor it is a ridge regression of log(bits - floor) as in RegMix (Liu et al., 2024); floor and
ridge are those with the least error on proxies left out. The weighted sum of such laws is convex, so that it has one
minimum. docs/mixtures.md says how to choose the proxies and how far to trust them.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":

    def stop(number: int, _: object) -> None:
        """End the program at a signal; a proxy's run ends with it."""
        print("\nstopped; the same command resumes", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)  # before the imports, which take long
    signal.signal(signal.SIGTERM, stop)

import argparse
import difflib
import json
import math
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from streaming_rwkv import UserError, read_manifest
from streaming_rwkv.config import load_config
from streaming_rwkv.console import print_error
from streaming_rwkv.filesystem import read_regular_file, write_atomically
from streaming_rwkv.processes import die_with_parent, listen_to_stop_signals
from streaming_rwkv.train.config import RunConfig

Floats = NDArray[np.float64]

FLOORS = np.array([0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])  # as parts of the least bits per byte that was seen
RIDGES = 10.0 ** np.arange(-5, 3)  # as parts of the mean variance of a share
# Of proxies left out, as a part of the constant's error: it leaves 64 % of the variance unexplained. Of 60 sets of 8 or
# of 12 proxies with noise alone, one had less; of 24 proxies, none.
LARGEST_ERROR = 0.8
FEWEST_PROXIES = 4
MOST_PROXIES = 1000
# Of two equal sources, two samples in three are one source alone at the lower end; at the upper end shares differ from
# the natural ones by half a percentage point.
CONCENTRATIONS = (0.1, 10_000.0)
LARGEST_FILE = 1 << 28  # bytes of a proxy's metrics, and of this program's own files
METRIC = "validation/bits_per_byte/source/"


@dataclass(frozen=True, kw_only=True)
class Law:
    """Bits per byte of one validation set, by the K shares of sources."""

    floor: float
    level: float
    slopes: Floats  # (K,)
    mean: Floats  # (K,) shares at which the exponent is the level

    def bits(self, shares: Floats) -> Floats:
        """Return the predictions (…,) for shares (…, K)."""
        return np.asarray(self.floor + np.exp(self.level + (shares - self.mean) @ self.slopes))

    def gradient(self, shares: Floats) -> Floats:
        return np.asarray((self.bits(shares) - self.floor) * self.slopes)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Laws of V validation sets, what they predict for each of N proxies left out, and the mixture of least bits."""

    laws: list[Law]
    left_out: Floats  # (N, V)
    error: float  # of the weighted mean of the validation sets, root mean square over proxies left out
    spread: float  # the same of a constant: the mean of the other proxies
    proposal: Floats | None  # (K,) shares; None if the laws are no better than a constant


def fit_law(shares: Floats, bits: Floats) -> Law:
    """Fit the law of one validation set to shares (N, K) and bits (N,)."""
    mean = shares.mean(0)
    centered = shares - mean
    floors = FLOORS * bits.min()
    logs = np.log(bits[:, None] - floors)  # (N, floors)
    gram, scale = centered.T @ centered, float((centered**2).mean() * len(shares)) or 1.0
    best, chosen = np.inf, (0, np.zeros(shares.shape[1]))
    for ridge in RIDGES:
        solve = np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), centered.T)  # (K, N)
        hat = centered @ solve + 1 / len(bits)
        # Exactly the residuals of fits without the proxy, for this floor and ridge.
        residuals = (logs - hat @ logs) / (1 - hat.diagonal())[:, None]
        errors = np.sqrt(((floors + np.exp(np.minimum(logs - residuals, 50.0)) - bits[:, None]) ** 2).mean(0))
        at = int(errors.argmin())
        if errors[at] < best:
            best, chosen = float(errors[at]), (at, solve @ logs[:, at])
    at, slopes = chosen
    return Law(floor=float(floors[at]), level=float(logs[:, at].mean()), slopes=slopes, mean=mean)


def fit_mixture(shares: Floats, bits: Floats, weights: Floats, *, capacity: Floats | None = None) -> Fit:
    """Fit the laws, and find the mixture with the least weighted bits per byte.

    No share of the proposal is outside those of the proxies, where nothing was measured.

    Args:
        shares: (N, K) of the proxies; the first is the natural mixture.
        bits: (N, V) per byte of the validation sets.
        weights: (V,) of the validation sets, adding up to 1.
        capacity: (K,) largest shares, beyond which a source would be repeated too often; not below the natural ones.
    """
    columns = range(bits.shape[1])
    # Floor and ridge are chosen again without each proxy, or the errors would be too small.
    left_out = np.array(
        [
            [float(fit_law(np.delete(shares, i, 0), np.delete(bits[:, v], i)).bits(shares[i])) for v in columns]
            for i in range(len(shares))
        ]
    )
    laws = [fit_law(shares, bits[:, v]) for v in columns]
    observed = bits @ weights
    error = _root_mean_square(left_out @ weights - observed)
    spread = _root_mean_square((observed - observed.mean()) * len(observed) / (len(observed) - 1))
    lower, upper = shares.min(0), shares.max(0)
    if capacity is not None:
        upper = np.minimum(upper, np.maximum(capacity, shares[0]))
    is_better = error <= LARGEST_ERROR * spread and spread > 0
    proposal = minimum(laws, weights, start=shares[0], lower=lower, upper=upper) if is_better else None
    return Fit(laws=laws, left_out=left_out, error=error, spread=spread, proposal=proposal)


def minimum(laws: Sequence[Law], weights: Floats, *, start: Floats, lower: Floats, upper: Floats) -> Floats:
    """Return the shares within the bounds with the least weighted bits: a convex problem, by projected gradients."""
    shares, step = start, 1.0
    value = float(weights @ [law.bits(shares) for law in laws])
    for _ in range(10_000):
        gradient = weights @ [law.gradient(shares) for law in laws]
        moved = project(shares - step * gradient, lower, upper)
        change = moved - shares
        if np.abs(change).max() < 1e-7 * min(1.0, step):
            break
        reached = float(weights @ [law.bits(moved) for law in laws])
        if reached <= value + float(gradient @ change) + float(change @ change) / (2 * step):
            shares, value, step = moved, reached, 1.5 * step
        else:
            step /= 2
    return shares


def project(values: Floats, lower: Floats, upper: Floats) -> Floats:
    """Return the nearest shares within the bounds that add up to 1: all values less one shift, within the bounds."""
    shifts = np.sort(np.concatenate([values - upper, values - lower]))[::-1]
    sums = np.clip(values - shifts[:, None], lower, upper).sum(1)  # rising, and linear between these shifts
    return np.clip(values - np.interp(1.0, sums, shifts), lower, upper)


def sample_mixtures(
    natural: Mapping[str, float], *, count: int, seed: int, concentration: float
) -> list[dict[str, float]]:
    """Return the natural mixture and samples round it; a larger count only adds some."""
    alpha = concentration * np.array(list(natural.values()))
    samples = np.random.default_rng(seed).dirichlet(alpha, size=count - 1)
    rows = [list(natural.values()), *samples.tolist()]
    return [{name: round(share, 4) for name, share in zip(natural, row, strict=True)} for row in rows]


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """The runs of one YAML that differ by the mixture, one folder each."""

    yaml: str
    overrides: Sequence[str]
    processes: int
    config: RunConfig
    folder: Path
    sets: Sequence[str]  # of validation

    def command(self, number: int, mixture: Mapping[str, float]) -> list[str]:
        """Return the command that trains a proxy, or resumes it."""
        name, config = f"proxy-{number:02}", self.config
        command = [sys.executable, "-m", "streaming_rwkv.train", self.yaml, *self.overrides]
        command += [f"save_folder={self.folder / name}", f"data.stages.0.sources={json.dumps(mixture)}"]
        if config.data.cache is None:
            command.append(f"data.cache={self.folder / 'cache'}")
        if config.save_remote is not None:
            command.append(f"save_remote={config.save_remote.rstrip('/')}/{name}")
        return [*command, "--processes", str(self.processes)] if self.processes > 1 else command

    def bits_per_byte(self, number: int, mixture: Mapping[str, float]) -> dict[str, float] | None:
        """Return the result of a finished proxy, None for one that is not.

        Raises:
            UserError: it was trained on another mixture, or its file is damaged.
        """
        file = self.folder / f"proxy-{number:02}" / "result.json"
        try:
            result = _read_object(file, read_regular_file(file, most=LARGEST_FILE))
        except FileNotFoundError:
            return None
        sources = result.get("sources")
        if sources != mixture:
            raise UserError(f"{file}: found {sources}, expected {dict(mixture)}; choose another folder")
        return self._check_bits(file, result.get("bits_per_byte"))

    def train(self, number: int, mixture: Mapping[str, float]) -> dict[str, float]:
        """Train a proxy to its end, and return its last bits per byte of each validation set.

        Raises:
            UserError: it was stopped or failed, its metrics are damaged, or its bits per byte are not finite.
        """
        folder = self.folder / f"proxy-{number:02}"
        status = _wait_for(self.command(number, mixture))
        if status:
            raise UserError(f"{folder}: its run ended with status {status}; the same command resumes it")
        file = folder / "metrics.jsonl"
        last: dict[str, Any] = {}
        for line in read_regular_file(file, most=LARGEST_FILE).splitlines():
            metrics = _read_object(file, line)
            last = {key.removeprefix(METRIC): value for key, value in metrics.items() if METRIC in key} or last
        bits = self._check_bits(file, last)
        _write(folder / "result.json", json.dumps({"sources": mixture, "bits_per_byte": bits}, indent=2))
        return bits

    def _check_bits(self, file: Path, found: Any) -> dict[str, float]:
        bits: dict[str, Any] = {name: found.get(name) if isinstance(found, dict) else None for name in self.sets}
        if not all(isinstance(value, float) and 0 < value < math.inf for value in bits.values()):
            raise _unusable(file, f"the bits per byte {bits}")
        return bits


def _read_object(file: Path, text: bytes) -> dict[str, Any]:
    """Return the JSON object that a file, or a line of it, consists of."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _unusable(file, f"{text[:60]!r}, which is no JSON object")
    return found


def _unusable(file: Path, found: str) -> UserError:
    return UserError(f"{file}: found {found}; remove {file.parent} to train this proxy again")


def _wait_for(command: Sequence[str]) -> int:
    """Run a command; Ctrl-C, SIGTERM or SIGHUP has it finish its step and write a checkpoint."""
    process = subprocess.Popen(
        command,
        start_new_session=True,  # the terminal's Ctrl-C would reach it a second time
        preexec_fn=partial(die_with_parent, os.getpid()),  # or it would train on if this program was killed
    )
    handlers = listen_to_stop_signals(lambda _: process.terminate())
    try:
        return process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _write(file: Path, text: str) -> None:
    write_atomically(file, f"{text}\n".encode())


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt((values**2).mean()))


def natural_tokens(config: RunConfig) -> dict[str, int]:
    """Return the tokens of each source within the lengths of the stage.

    Raises:
        UserError: the YAML is not one of a proxy, or the data set has nothing to compare.
    """
    stage, manifest = config.data.stages[0], read_manifest(config.data.path)
    if len(config.data.stages) > 1 or stage.tokens is None or stage.sources or stage.streams or stage.temperature:
        raise UserError(
            "data.stages: a proxy has one stage, with a length in `tokens` and without `sources`, `streams` and "
            "`temperature`, since this program gives its shares of sources"
        )
    low, high = stage.min_length or 1, stage.max_length or manifest.edges[-1]
    tokens: dict[str, int] = {}
    for stream in manifest.streams:
        if stream.split == "train" and low <= stream.lower and stream.upper <= high:
            tokens[stream.source] = tokens.get(stream.source, 0) + stream.targets
    if len(tokens) < 2 or not any(stream.split == "validation" for stream in manifest.streams):
        raise UserError(
            f"{config.data.path}: has {len(tokens)} sources within the lengths, and "
            f"{sum(stream.split == 'validation' for stream in manifest.streams)} validation streams; a mixture needs "
            "two sources or more, and validation packs to compare by"
        )
    return tokens


def check_same_proxies(file: Path, settings: Mapping[str, object]) -> None:
    """Write the settings of the proxies in a folder, or compare them with those that it has.

    Raises:
        UserError: other settings, whose results cannot be fitted together, or a damaged file.
    """
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    try:
        before = read_regular_file(file, most=LARGEST_FILE).decode()
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, text.rstrip("\n"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: is damaged: found bytes that are not UTF-8; choose another folder") from None
    else:
        if before == text:
            return
        changes = [line for line in difflib.ndiff(before.splitlines(), text.splitlines()) if line[0] in "+-"]
        raise UserError(
            f"{file}: these proxies were begun with other settings ({'; '.join(changes[:6])}); give the same ones, or "
            "another folder"
        )


def parse_weights(text: str | None, sets: Sequence[str]) -> Floats:
    """Return the weights of the validation sets, adding up to 1; equal ones by default.

    Raises:
        UserError: not `NAME=NUMBER,…` with names of validation sets.
    """
    if text is None:
        return np.full(len(sets), 1 / len(sets))
    try:
        pairs = [(name, float(value)) for name, value in (part.rsplit("=", 1) for part in text.split(","))]
    except ValueError:
        raise UserError(f"--weights: found {text!r}, expected NAME=NUMBER,…, such as web=1,code=2") from None
    given, total = dict(pairs), sum(value for _, value in pairs)
    is_repeated = len(given) < len(pairs)
    if set(given) - set(sets) or is_repeated or min(given.values()) < 0 or not 0 < total < math.inf:
        raise UserError(
            f"--weights: found {text!r}; give weights of 0 or more for {', '.join(sets)}, each once, with a finite sum "
            "above 0"
        )
    return np.array([given.get(name, 0.0) for name in sets]) / total


def report(
    fit: Fit, shares: Floats, bits: Floats, weights: Floats, *, sources: Sequence[str], sets: Sequence[str]
) -> None:
    """Print the mixtures with what was observed and predicted, and the errors by validation set."""
    observed, left_out = bits @ weights, fit.left_out @ weights
    rows = [["mixture", *sources, "bits per byte", "predicted without it"]]
    for number, row in enumerate(shares):
        name = "natural" if number == 0 else f"proxy-{number:02}"
        rows.append([name, *(f"{share:.3f}" for share in row), f"{observed[number]:.4f}", f"{left_out[number]:.4f}"])
    proposed = [float("nan")] * len(sets)
    if fit.proposal is not None:
        proposed = [float(law.bits(fit.proposal)) for law in fit.laws]
        rows.append(["proposed", *(f"{share:.3f}" for share in fit.proposal), "", f"{np.dot(proposed, weights):.4f}"])
    print_table(rows)
    rows = [["validation", "weight", "error", "of a constant", "natural", "predicted", "proposed"]]
    natural = [float(law.bits(shares[0])) for law in fit.laws]
    count = len(shares)
    for v, name in enumerate(sets):
        error = _root_mean_square(fit.left_out[:, v] - bits[:, v])
        constant = float(bits[:, v].std()) * count / (count - 1)
        numbers = [error, constant, bits[0, v], natural[v], proposed[v]]
        rows.append([name, f"{weights[v]:.3f}", *(f"{number:.4f}" for number in numbers)])
    numbers = [fit.error, fit.spread, observed[0], np.dot(natural, weights), np.dot(proposed, weights)]
    rows.append(["weighted", "", *(f"{number:.4f}" for number in numbers)])
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    print(flush=True)


def propose(fit: Fit, shares: Floats, weights: Floats, *, sources: Sequence[str], capacity: Floats, file: Path) -> None:
    """Print the proposal with what limits it and write it as YAML, or say why there is none."""
    if fit.proposal is None:
        file.unlink(missing_ok=True)
        print(
            f"no proposal: the error on proxies left out, {fit.error:.4f}, is not clearly below that of a constant, "
            f"{fit.spread:.4f}; the mixture matters too little here, or there are too few or too short proxies"
        )
        return
    gain = float(weights @ [float(law.bits(shares[0]) - law.bits(fit.proposal)) for law in fit.laws])
    print(f"predicted gain over the natural mixture: {gain:.4f} bits per byte, with an error of {fit.error:.4f}")
    if gain <= fit.error:
        print("the gain is within the error: the natural mixture may be as good")
    for j, name in enumerate(sources):
        share = fit.proposal[j]
        if share >= capacity[j] - 1e-4:
            print(f"{name}: at the share that repeats it data.max_repeats times")
        elif share >= shares[:, j].max() - 1e-4 or share <= shares[:, j].min() + 1e-4:
            print(f"{name}: at the end of the shares that were tried; a smaller --concentration tries more")
    fragment = {name: round(float(share), 4) for name, share in zip(sources, fit.proposal, strict=True)}
    text = yaml.safe_dump({"data": {"stages": [{"sources": fragment}]}}, sort_keys=False).rstrip("\n")
    _write(file, text)
    print(f"{file}:\n{text}")


def run(options: argparse.Namespace) -> None:
    """Run the proxies that are missing, fit, and report.

    Raises:
        UserError: a setting cannot be used, or a proxy did not finish.
    """
    least, most = CONCENTRATIONS
    if not FEWEST_PROXIES <= options.proxies <= MOST_PROXIES or not least <= options.concentration <= most:
        raise UserError(
            f"give --proxies of {FEWEST_PROXIES} to {MOST_PROXIES:,}, and a --concentration of {least} to {most:,.0f}"
        )
    if options.seed < 0 or options.processes < 1:
        raise UserError("give a --seed of 0 or more, and --processes of 1 or more")
    config = load_config(RunConfig, options.config, overrides=options.overrides)
    tokens = natural_tokens(config)
    natural = {name: count / sum(tokens.values()) for name, count in tokens.items()}
    manifest = read_manifest(config.data.path)
    sets = sorted({stream.source for stream in manifest.streams if stream.split == "validation"})
    weights = parse_weights(options.weights, sets)  # an error in them is told before the runs
    mixtures = sample_mixtures(natural, count=options.proxies, seed=options.seed, concentration=options.concentration)
    proxies = Proxies(
        yaml=options.config, overrides=options.overrides, processes=options.processes, config=config,
        folder=options.folder, sets=sets,
    )  # fmt: skip
    if options.show:
        for number, mixture in enumerate(mixtures):
            print(shlex.join(proxies.command(number, mixture)))
        return
    check_same_proxies(
        options.folder / "proxies.yaml",
        {"seed": options.seed, "concentration": options.concentration,
         "data": manifest.fingerprint, "run": yaml.safe_load(config.to_yaml())},
    )  # fmt: skip
    results = []
    for number, mixture in enumerate(mixtures):
        result = proxies.bits_per_byte(number, mixture)
        print(f"proxy {number + 1} of {len(mixtures)}: {mixture}{', finished before' if result else ''}", flush=True)
        results.append(result or proxies.train(number, mixture))
    shares = np.array([[mixture[name] for name in natural] for mixture in mixtures])
    shares /= shares.sum(1, keepdims=True)
    bits = np.array([[result[name] for name in sets] for result in results])
    stage_tokens = config.data.stages[0].tokens or 1
    capacity = config.data.max_repeats * config.data.fraction * np.array(list(tokens.values())) / stage_tokens
    fit = fit_mixture(shares, bits, weights, capacity=capacity)
    print()
    report(fit, shares, bits, weights, sources=list(natural), sets=sets)
    propose(fit, shares, weights, sources=list(natural), capacity=capacity, file=options.folder / "proposal.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="the YAML of a proxy run")
    parser.add_argument("folder", type=Path, help="for the proxies, one folder each, and the proposal")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings of all proxies")
    parser.add_argument("--proxies", type=int, default=24, help="number of runs, the natural one too (default: 24)")
    parser.add_argument("--seed", type=int, default=17, help="of the sampled mixtures (default: 17)")
    parser.add_argument(
        "--concentration", type=float, default=2.0, help="nearness of the samples to the natural mixture (default: 2)"
    )
    parser.add_argument("--weights", help="of the validation sets, such as web=1,code=2 (default: equal)")
    parser.add_argument("--processes", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--show", action="store_true", help="print the commands of the runs, and exit")
    options = parser.parse_intermixed_args(arguments)
    try:
        run(options)
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
