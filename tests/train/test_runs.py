"""Whole runs by `composer train.py`: killed at every kind of moment and started again, they are the unbroken run.

A run is stopped where a test wants it by a hook that each of its processes loads (`FREEZE`): the process that is about
to write the n-th time to the file named there stops itself, and with it the run; then the test sends its signal. The
processes of a run are found by their session, which they keep when their parent has ended: no test passes because an
orphan finished the work.

Most runs are forked from a process that has imported everything (`tests.fork_server`); those that test the launcher
itself are started by the real one (`real=True`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from streaming_rwkv.inference import command_line
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.train.checkpoints.local import newest_checkpoint
from tests.fork_server import ForkedProgram, ForkServer
from tools.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS = 30  # two passes over 60 packs, 4 to a step; checkpoints at 6, 12, …, evaluation at 12, 24 and the end
SETTINGS = [
    "model.hidden_size=64", "model.num_layers=1", "data.batch_packs=4", "data.stages.0.passes=2",
    "checkpoint.interval_steps=6", "evaluation.interval_steps=12", "log.interval_steps=5", "log.tensorboard=false",
]  # fmt: skip
TRAIN = {("web", 1, 16): 24, ("web", 17, 32): 20, ("code", 1, 16): 16}
VALIDATION = {("web", 1, 16): 4, ("code", 1, 16): 3}

FREEZE = """
import os, signal, sys, time

suffix, _, number = os.environ.get("FREEZE_AT", "").rpartition(":")
if suffix:
    count = 0
    installed_in = os.getpid()  # a process that is forked installs its own

    def hook(event, arguments):
        global count
        if os.getpid() != installed_in:
            return
        if event != "open" or not str(arguments[0]).endswith(suffix):
            return
        _, mode, flags = arguments
        if (mode or "r")[0] in "aw" or (mode is None and flags & os.O_APPEND):
            count += 1
            if count == int(number):
                os.kill(os.getpid(), signal.SIGSTOP)
                # What waited for it meanwhile may be taken by any thread, which can be slow to note it for this one.
                time.sleep(0.5)

    sys.addaudithook(hook)
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    launcher: subprocess.Popen[bytes] | ForkedProgram
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Every living process that descends from the launcher, and the launcher."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):  # gone, or not ours
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.launcher.pid).children()

    def wait_until_frozen(self) -> psutil.Process:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            for process in self.processes():
                try:
                    if process.status() == psutil.STATUS_STOPPED:
                        return process
                except psutil.Error:
                    continue
            assert self.launcher.poll() is None, f"ended before it was frozen:\n{self.log.read_text()}"
            time.sleep(0.1)
        raise AssertionError(f"not frozen in time:\n{self.log.read_text()}")

    def kill_all(self) -> None:
        processes = self.processes()
        assert len(processes) >= 2  # the launcher and a rank at least
        while processes:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            processes = self.processes()
        self.launcher.wait(timeout=60)

    def assert_nothing_left(self, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"still there: {[(process.pid, process.cmdline()) for process in left]}"

    def finish(self, *, seconds: float = 300) -> tuple[int, str]:
        """Exit status and output, once all processes are gone."""
        status = self.launcher.wait(timeout=seconds)
        self.assert_nothing_left(seconds=60)
        return status, self.log.read_text()


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A data set, and the hook's folder."""

    data: Path
    folder: Path
    programs: ForkServer

    @contextmanager
    def run(
        self,
        save_folder: Path,
        *overrides: str,
        processes: int = 1,
        freeze_at: str = "",
        data: Path | None = None,
        real: bool = False,
    ) -> Iterator[Run]:
        environment = os.environ | {
            "FREEZE_AT": freeze_at, "PYTHONPATH": str(self.folder / "hook"), "OMP_NUM_THREADS": "1"
        }  # fmt: skip
        command = [
            Path(sys.executable).with_name("composer"), "-n", str(processes), "--master_port", str(free_ports(1)[0]),
            "train.py", "yamls/tiny_cpu.yaml",
            f"data.path={data or self.data}", f"save_folder={save_folder}", *SETTINGS, *overrides,
        ]  # fmt: skip
        log = self.folder / f"{uuid.uuid4().hex}.log"
        launcher: subprocess.Popen[bytes] | ForkedProgram
        with open(log, "wb") as output:
            options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            if real:
                launcher = subprocess.Popen(command, start_new_session=True, **options)
            else:
                launcher = self.programs.popen(command, **options)
        run = Run(launcher=launcher, log=log)
        try:
            yield run
        finally:
            for process in run.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.wait(timeout=60)

    def train(self, save_folder: Path, *overrides: str, **options: Any) -> tuple[int, str]:
        with self.run(save_folder, *overrides, **options) as run:
            return run.finish()


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Path], programs: ForkServer
) -> Workplace:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(FREEZE)
    data = write_data_set(folder / "data", TRAIN, validation=VALIDATION)
    return Workplace(data=data, folder=folder, programs=programs)


def train_losses(save_folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (save_folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/train/total"]) for line in lines if "loss/train/total" in line]


def validation_losses(save_folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (save_folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation/loss/all"]) for line in lines if "validation/loss/all" in line]


def stream_losses(save_folder: Path) -> dict[tuple[int, str], float]:
    """Return the mean loss of each stream since the last line that has it, by step and name."""
    lines = [json.loads(line) for line in (save_folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in line if name.startswith("loss/stream/")}


def checkpoints(save_folder: Path) -> list[str]:
    return sorted(path.name for path in (save_folder / "checkpoints").iterdir())


def newest_step(save_folder: Path) -> int:
    checkpoint = newest_checkpoint(save_folder / "checkpoints")
    return checkpoint.step if checkpoint else 0


def last_weights(save_folder: Path) -> dict[str, torch.Tensor]:
    return read_state(save_folder / "checkpoints" / f"step-{STEPS:08}")


def assert_same_run(save_folder: Path, reference: Path) -> None:
    """Weights are equal to the last bit, and so is the loss of each step, which is recorded once."""
    weights, expected = last_weights(save_folder), last_weights(reference)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert train_losses(save_folder) == train_losses(reference)
    assert validation_losses(save_folder) == validation_losses(reference)
    # Sums of float64, in another order.
    assert stream_losses(save_folder) == pytest.approx(stream_losses(reference), rel=1e-12)
    mark, expected_mark = (newest_checkpoint(folder / "checkpoints").mark for folder in (save_folder, reference))  # type: ignore[union-attr]
    assert [getattr(mark, key) for key in ("tokens", "samples", "consumed")] == [
        getattr(expected_mark, key) for key in ("tokens", "samples", "consumed")
    ]


@pytest.fixture(scope="module")
def unbroken(place: Workplace) -> Path:
    status, output = place.train(place.folder / "unbroken")
    assert status == 0, output
    return place.folder / "unbroken"


@pytest.fixture(scope="module")
def unbroken_with_two(place: Workplace) -> Path:
    status, output = place.train(place.folder / "unbroken-2", processes=2)
    assert status == 0, output
    return place.folder / "unbroken-2"


@pytest.mark.end_to_end
def test_a_run_learns_and_leaves_its_metrics_and_checkpoints(unbroken: Path) -> None:
    losses = train_losses(unbroken)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses[-1][1] < losses[0][1] - 1
    assert [step for step, _ in validation_losses(unbroken)] == [12, 24, 30]
    assert checkpoints(unbroken) == ["step-00000018", "step-00000024", "step-00000030"]
    mark = newest_checkpoint(unbroken / "checkpoints").mark  # type: ignore[union-attr]
    assert mark.samples == 2 * (24 + 20 + 16)
    assert mark.tokens == sum(mark.consumed.values())


@pytest.mark.end_to_end
def test_two_processes_train_like_one(unbroken: Path, unbroken_with_two: Path) -> None:
    """The same packs in every step; sums over ranks round in another order."""
    for (step, one), (_, two) in zip(train_losses(unbroken), train_losses(unbroken_with_two), strict=True):
        assert two == pytest.approx(one, abs=1e-5), step


@pytest.mark.end_to_end
def test_one_process_killed_repeatedly_ends_like_the_unbroken_run(place: Workplace, unbroken: Path) -> None:
    folder = place.folder / "killed"
    with place.run(folder, freeze_at="/metrics.jsonl:9") as run:  # step 9 is done, but not yet in the log
        run.wait_until_frozen()
        assert newest_step(folder) == 6
        status, output = place.train(folder)
        assert status == 1
        assert "this save folder is in use (by process" in output
        assert "give this run its own `save_folder`" in output
        run.kill_all()
        run.assert_nothing_left(seconds=0)

    with place.run(folder, freeze_at=".step-00000012.tmp/.complete.json.tmp:1") as run:
        run.wait_until_frozen()
        assert "resuming from" in run.log.read_text()
        assert "step-00000006" in run.log.read_text()
        assert checkpoints(folder) == [".step-00000012.tmp", "step-00000006"]
        run.kill_all()
        run.assert_nothing_left(seconds=0)
    assert newest_step(folder) == 6

    with place.run(folder, "data.workers=2", freeze_at="/metrics.jsonl:11", real=True) as run:
        run.wait_until_frozen()  # step 16: with the evaluation after 12, the 11th line after step 6
        assert newest_step(folder) == 12
        run.launcher.kill()  # alone
        run.launcher.wait(timeout=60)
        run.assert_nothing_left()
    assert newest_step(folder) == 12

    status, output = place.train(folder, "data.workers=0")
    assert status == 0, output
    assert "step-00000012" in output
    assert_same_run(folder, unbroken)

    status, output = place.train(folder)
    assert status == 0
    assert "this run is finished (30 steps); nothing to do" in output
    assert_same_run(folder, unbroken)


def test_two_processes_killed_repeatedly_end_like_the_unbroken_run(place: Workplace, unbroken_with_two: Path) -> None:
    folder = place.folder / "killed-2"
    with place.run(folder, processes=2, freeze_at="/metrics.jsonl:9") as run:
        run.wait_until_frozen()
        assert len(run.ranks()) == 2
        assert newest_step(folder) == 6
        run.kill_all()
        run.assert_nothing_left(seconds=0)

    with place.run(folder, processes=2, freeze_at=".step-00000012.tmp/__0_0.distcp:1") as run:
        run.wait_until_frozen()
        assert "step-00000006" in run.log.read_text()
        run.kill_all()
        run.assert_nothing_left(seconds=0)
    assert newest_step(folder) == 6

    status, output = place.train(folder, processes=2)
    assert status == 0, output
    assert_same_run(folder, unbroken_with_two)


def test_the_last_checkpoint_evaluates_as_the_run_did(
    place: Workplace, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.evaluate([str(unbroken), str(place.data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    step, loss = validation_losses(unbroken)[-1]
    assert step == STEPS
    assert found["validation/loss/all"] == pytest.approx(loss, rel=1e-6)


def press_ctrl_c(run: Run) -> None:
    os.killpg(run.launcher.pid, signal.SIGINT)


def stop_launcher(run: Run) -> None:
    """Send SIGTERM to the launcher, as the end of a container does; the launcher passes it on."""
    run.launcher.terminate()


def stop_everything(run: Run) -> None:
    """Send SIGTERM to every process of the job and the loader's workers, as systemd and schedulers do."""
    for process in psutil.Process(run.launcher.pid).children(recursive=True):
        process.send_signal(signal.SIGTERM)
    run.launcher.terminate()


def wait_until_signalled(process: psutil.Process) -> None:
    """Wait until a stopped process has a pending signal."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.partition("ShdPnd:")[2].split()[0], 16):
            return
        time.sleep(0.05)
    raise AssertionError("the signal never came")


def test_a_run_asked_to_stop_saves_and_resumes_with_another_world_size(place: Workplace, unbroken: Path) -> None:
    folder = place.folder / "moved"
    for processes, microbatch, workers, stop, step, freeze_at, real in (
        (1, 4, 2, press_ctrl_c, 5, "/metrics.jsonl:5", True),
        (2, 1, 1, stop_launcher, 9, "/metrics.jsonl:4", False),
        (1, 2, 2, stop_everything, 16, "/metrics.jsonl:8", False),  # the line of an evaluation is among them
    ):
        settings = [f"microbatch_packs={microbatch}", f"data.workers={workers}"]
        with place.run(folder, *settings, processes=processes, freeze_at=freeze_at, real=real) as run:
            frozen = run.wait_until_frozen()
            stop(run)
            wait_until_signalled(frozen)
            os.kill(frozen.pid, signal.SIGCONT)
            status, output = run.finish()
        assert status == 143, output
        stopping = output.index("stopping: finishing this step and writing a checkpoint; press Ctrl-C again")
        assert stopping < output.index(f"stopped at step {step} of 30 on request; rerun the same command to resume")
        assert newest_step(folder) == step
    status, output = place.train(folder)
    assert status == 0, output
    assert "step-00000016" in output
    losses, expected = train_losses(folder), train_losses(unbroken)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    for (step, loss), (_, other) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(other, abs=1e-5), step
    consumed, expected_consumed = (
        newest_checkpoint(path / "checkpoints").mark.consumed  # type: ignore[union-attr]
        for path in (folder, unbroken)
    )
    assert consumed == expected_consumed


def test_the_program_trains_on_two_processes_as_composer_does(place: Workplace, unbroken_with_two: Path) -> None:
    folder = place.folder / "program"
    program = [sys.executable, "-m", "streaming_rwkv", "train", "yamls/tiny_cpu.yaml", "processes=2"]
    settings = [f"data.path={place.data}", f"save_folder={folder}", *SETTINGS]
    done = place.programs.run([*program, *settings], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(folder, unbroken_with_two)
    assert "Press Ctrl-C to exit immediately" not in done.stdout


def changed_manifest(data: Path, to: Path) -> Path:
    """The data set with another tokenizer in its manifest, and so another data set."""
    shutil.copytree(data, to)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "f" * 64
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_a_run_does_not_resume_with_other_settings_unless_they_are_allowed(
    place: Workplace, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(unbroken, folder, ignore=shutil.ignore_patterns("step-00000030"))
    other = changed_manifest(place.data, tmp_path / "other")
    status, output = place.train(folder, "data.batch_packs=2", "data.stages.0.passes=1", data=other)
    assert status == 1
    for name in (
        "batch_packs: the checkpoint has 4, this run 2",
        "data: the checkpoint has ",
        "mixture: ",
        "tokenizer:",
    ):
        assert f"\n  {name}" in output
    assert "checkpoint.allow_changed=[batch_packs,data,mixture,tokenizer]" in output
    assert checkpoints(folder) == ["step-00000018", "step-00000024"]

    status, output = place.train(folder, "data.batch_packs=3", "checkpoint.allow_changed=[batch_packs]")
    assert status == 0, output
    assert "resuming from" in output
    assert newest_step(folder) == 24 + (30 - 24) * 4 // 3  # the packs that were left, three to a step


# tests/data tries each with 0, 1 and 2 workers; a whole run of each takes half a minute.
@pytest.mark.parametrize(
    ("how", "workers", "text"),
    [("missing", 2, "cannot be fetched"), ("corrupt", 0, "does not have the hash that the index gives")],
)
def test_a_shard_that_is_missing_or_corrupt_stops_the_run_and_is_named(
    how: str, workers: int, text: str, place: Workplace, tmp_path: Path
) -> None:
    """The shard is damaged after the run has looked for its shards; it finds earlier damage at its start."""
    data = Path(shutil.copytree(place.data, tmp_path / "data"))
    (shard,) = (data / "train" / "web" / "17-32").glob("*.zstd")
    with place.run(tmp_path / "run", f"data.workers={workers}", data=data, freeze_at="/.config.yaml.tmp:1") as run:
        frozen = run.wait_until_frozen()
        if how == "missing":
            shard.unlink()
        else:
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        frozen.resume()
        while "starting at step 0" not in run.log.read_text():
            assert run.launcher.poll() is None, run.log.read_text()
            time.sleep(0.1)
        status, output = run.finish()
    assert status != 0
    assert f"{data}/train/web/17-32/shard.00000.mds.zstd: {text}" in output


@pytest.mark.end_to_end
def test_an_error_of_two_processes_is_printed_once(place: Workplace, tmp_path: Path) -> None:
    status, output = place.train(tmp_path / "run", "data.batch_packs=3", processes=2)
    assert status == 1
    error = "error: data.batch_packs: 3 packs do not divide among 2 processes; the nearest that do are"
    assert output.count("error: ") == output.count(error) == 1, output
    assert "Traceback" not in output


def test_an_unknown_key_is_named_with_the_nearest_key(place: Workplace, tmp_path: Path) -> None:
    with place.run(tmp_path / "run", "data.stgaes=1", processes=2) as run:
        status, output = run.finish()
    assert status == 1
    assert output.count("command line: data.stgaes: unknown key; did you mean 'stages'?") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(place: Workplace, tmp_path: Path) -> None:
    data = changed_manifest(place.data, tmp_path / "data")
    with place.run(tmp_path / "run", data=data) as run:
        status, output = run.finish()
    assert status == 1
    assert f"that of the tokenizer that made the tokens is '{64 * 'f'}'" in output
    assert "Traceback" not in output
