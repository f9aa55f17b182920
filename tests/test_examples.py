"""examples/: each program does what it is for, and type checkers accept it."""

from __future__ import annotations

import itertools
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from streaming_rwkv import UserError, generate, load_model, load_tokenizer, read_manifest
from tests.example_modules import example
from tests.fork_server import ForkServer
from tools.ports import free_ports

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TESTS = [Path(__file__), *Path(__file__).parent.rglob("test_example_*.py")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    return write_data_set(folder / "data", {("web", 1, 16): 8, ("code", 17, 32): 4}, validation={("web", 1, 16): 2})


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give back the handlers of signals that a program run in this process has set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def accelerate() -> Iterator[ModuleType]:
    """Accelerate, which keeps its state in the process and in the environment."""
    module = pytest.importorskip("accelerate", reason="comes with the extra `examples`, and with `dev`")
    before = dict(os.environ)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


def test_every_example_is_tested() -> None:
    source = "".join(path.read_text() for path in TESTS)
    assert EXAMPLES
    tested = [path for path in EXAMPLES if f'example("{path.stem}")' in source or f'"{path.name}"' in source]
    assert tested == EXAMPLES


def test_pytorch_loop_continues_where_it_was_stopped(data: Path, tmp_path: Path) -> None:
    train = example("pytorch_loop").train
    whole = train(str(data), tmp_path / "whole")
    assert train(str(data), tmp_path / "parts", stop_at=3) != whole
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / "parts" / "new.pt").symlink_to(other)  # as a stranger's folder may have it
    assert train(str(data), tmp_path / "parts") == whole
    assert other.read_text() == "kept"
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["cache", "checkpoint.pt"]
    saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "parts")]
    assert saved[0]["data"] == saved[1]["data"] == {"step": 6}
    assert all(torch.equal(saved[0]["model"][name], saved[1]["model"][name]) for name in saved[0]["model"])
    model = load_model(tmp_path / "whole" / "checkpoint.pt")
    texts = [generate(model, load_tokenizer(data / "tokenizer"), "w1 w2", max_tokens=5, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_pytorch_loop_keeps_the_earlier_checkpoint_when_the_disk_is_full(tmp_path: Path) -> None:
    save, checkpoint = example("pytorch_loop").save, tmp_path / "checkpoint.pt"
    save({"a": torch.ones(2)}, checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of any file, as at `ulimit -f`
    try:
        with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be written \(\[Errno 27\] File too large\)"):
            save({"a": torch.ones(100_000)}, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert torch.load(checkpoint, weights_only=True)["a"].tolist() == [1, 1]


def test_accelerate_loop_keeps_the_earlier_state_when_the_disk_is_full(tmp_path: Path, accelerate: ModuleType) -> None:
    def save_state(folder: str) -> None:
        raise RuntimeError("No space left on device")

    (tmp_path / "state-00000003").mkdir()
    full = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=save_state)
    with pytest.raises(
        UserError, match=r"/new: cannot be written \(No space left on device\); the state before is kept"
    ):
        example("accelerate_loop").save(full, None, tmp_path)
    assert (tmp_path / "state-00000003").exists()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}])
def test_accelerate_loop_reports_the_variables_of_a_launcher(
    variables: dict[str, str], data: Path, tmp_path: Path, accelerate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^Accelerate cannot start \(.*\); use torchrun, or unset WORLD_SIZE"):
        example("accelerate_loop").train(str(data), tmp_path)


class Interrupting(ModuleType):
    """A module at whose import the user presses Ctrl-C."""

    def __getattr__(self, name: str) -> object:
        signal.raise_signal(signal.SIGINT)
        raise AttributeError(name)


@pytest.mark.parametrize("name", ["accelerate_loop", "fit_mixture", "pytorch_loop"])
def test_ctrl_c_ends_a_program_with_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if name == "accelerate_loop":
        request.getfixturevalue("accelerate")
    monkeypatch.setitem(sys.modules, "streaming_rwkv", Interrupting("streaming_rwkv"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip().startswith("stopped; the same command ")


def test_accelerate_loop_continues_where_it_was_stopped(data: Path, tmp_path: Path, accelerate: ModuleType) -> None:
    train = example("accelerate_loop").train
    whole = train(str(data), tmp_path / "whole")
    assert train(str(data), tmp_path / "parts", stop_at=3) != whole
    others = tmp_path / "others"
    others.mkdir()
    (tmp_path / "parts" / "new").symlink_to(others)  # as a stranger's folder may have it
    assert train(str(data), tmp_path / "parts") == whole
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.name != "cache"] == ["state-00000006"]
    assert not list(others.iterdir())
    assert not list((tmp_path / "parts" / "state-00000006").glob("custom_*"))  # accelerate would unpickle them


@pytest.mark.slow
def test_accelerate_loop_takes_the_same_steps_on_two_processes(
    data: Path, tmp_path: Path, accelerate: ModuleType, programs: ForkServer
) -> None:
    loss = example("accelerate_loop").train(str(data), tmp_path / "one")
    port, running = str(free_ports(1)[0]), []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "examples" / "accelerate_loop.py"), str(data), str(tmp_path / "two")]
        with open(tmp_path / f"{rank}.log", "wb") as log:
            running.append(programs.popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    statuses = [process.wait(timeout=600) for process in running]
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert statuses == [0, 0], logs
    assert "step 6/6" not in logs[1]  # Accelerate prints on one process, if it knows of both
    step, _, found = logs[0].strip().splitlines()[-1].partition("  loss ")
    assert step == "step 6/6"
    assert float(found) == pytest.approx(loss, abs=2e-3)  # sums over ranks round in another order, for six steps


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Streaming's, of each shard that it expands
def test_plain_streaming_reads_the_documents(data: Path) -> None:
    documents = list(example("plain_streaming").read_documents(data, source="code"))
    assert len(documents) == next(s.documents for s in read_manifest(data).streams if s.source == "code")
    first = [int(word.removeprefix("w")) for word in documents[0].split()]
    # In this data set each token is one more than the token before it; w0 begins and ends documents, without text.
    assert all((a + 1) % 97 in (b, 0) for a, b in itertools.pairwise(first))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("pytorch_loop", "NOWHERE OUT", "error: NOWHERE"),
        ("pytorch_loop", "DATA OUT --batch-packs 0", "error: open_dataset: batch_packs: found 0"),
        ("pytorch_loop", "DATA FILE", "error: [Errno 17] File exists: 'FILE'"),
        ("pytorch_loop", "DATA DAMAGED", "error: DAMAGED/checkpoint.pt: cannot be continued from (UnpicklingError); "),
        ("accelerate_loop", "DATA DAMAGED", "error: DAMAGED/state-00000003: cannot be continued from ("),
        ("accelerate_loop", "NOWHERE OUT", "error: NOWHERE"),
        ("accelerate_loop", "DATA OUT --batch-packs 0", "error: open_dataset: batch_packs: found 0"),
        ("accelerate_loop", "DATA FILE", "error: "),
        ("plain_streaming", "NOWHERE", "error: NOWHERE"),
        ("plain_streaming", "BROKEN", "error: BROKEN: Streaming cannot read it ("),
        (
            "plain_streaming",
            "DATA --source nope",
            "error: DATA: has no train packs of the source 'nope'; there are code, web",
        ),
        ("plain_streaming", "DATA --documents -1", "--documents: found -1, expected 0 or more"),
        ("clean", "NOWHERE OUT --kind any", "; install requirements/clean.txt, as the head of "),
        ("fit_mixture", "NOWHERE OUT --seed -1", "error: give a --seed of 0 or more"),
        ("fit_mixture", "NOWHERE OUT", "error: NOWHERE: no such file"),
    ],
)
def test_errors_of_a_user_are_one_line(
    name: str,
    arguments: str,
    error: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if name == "accelerate_loop":
        request.getfixturevalue("accelerate")
    paths = {"DATA": data, "OUT": tmp_path / "out", "FILE": tmp_path / "file", "NOWHERE": tmp_path / "nowhere"}
    paths["FILE"].touch()
    paths["BROKEN"] = Path(shutil.copytree(data, tmp_path / "broken"))
    for shard in paths["BROKEN"].rglob("*.mds.zstd"):
        shard.write_bytes(b"broken")
    paths["DAMAGED"] = tmp_path / "damaged"
    (paths["DAMAGED"] / "state-00000003").mkdir(parents=True)
    (paths["DAMAGED"] / "checkpoint.pt").write_bytes(b"damaged")
    monkeypatch.setitem(sys.modules, "datatrove", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", [name, *(str(paths.get(word, word)) for word in arguments.split())])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code not in (0, None)
    text = f"{ended.value.code}\n{capsys.readouterr().err}"
    for word, path in paths.items():
        text = text.replace(str(path), word)
    assert error in text


@pytest.mark.slow
def test_a_users_program_passes_strict_type_checks(tmp_path: Path) -> None:
    """With the types that the package ships, and the errors that it should have; `make check` does the examples."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from streaming_rwkv import RWKV8, open_dataset\n"
        "open_dataset('data', batch_pack=4)\n"
        "reveal_type(open_dataset('data', batch_packs=4))\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--cache-dir", ".mypy_cache/examples", str(wrong)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if ": note:" not in line or "Revealed" in line]
    assert [line.rpartition("/")[2].partition("[")[0].strip() for line in lines[:-1]] == [
        'wrong.py:1: error: Module "streaming_rwkv" has no attribute "RWKV8"; maybe "RWKV7"?',
        'wrong.py:2: error: Unexpected keyword argument "batch_pack" for "open_dataset"; did you mean "batch_packs"?',
        'wrong.py:3: note: Revealed type is "streaming_rwkv.data.steps.StepDataset"',
    ]
