"""docs/cluster.md: its settings exist, its commands parse, and two launchers on two nodes train as one does."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from composer.cli.launcher import _parse_args
from omegaconf import OmegaConf

from streaming_rwkv.config import load_config, validate
from streaming_rwkv.train.config import RunConfig
from tools.ports import free_ports

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
SETTINGS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
LEAST = {"save_folder": "run", "data": {"path": "data", "stages": [{"passes": 1}]}, "model": {"preset": "0.1B"}}


def test_the_page_has_examples() -> None:
    assert (len(SETTINGS), len(COMMANDS)) == (5, 5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_are_valid(settings: str) -> None:
    given = OmegaConf.create(settings)
    least = OmegaConf.create(LEAST)
    if "batch_packs" not in settings and "batch_tokens" not in settings:
        least.data.batch_packs = 1
    values = OmegaConf.to_container(OmegaConf.merge(least, given))
    assert isinstance(values, dict)
    validate(RunConfig, values, where="docs/cluster.md")  # type: ignore[arg-type]


def test_every_key_in_a_table_or_a_sentence_exists() -> None:
    # Keys within a section, such as `data.workers`; file names begin with none.
    sections = "data|model|optimizer|parallel|evaluation|checkpoint|log"
    keys = re.findall(rf"`((?:{sections})\.[a-z_.]+)", PAGE)
    assert len(keys) >= 8
    for key in keys:
        config = RunConfig
        for part in key.split("."):
            assert part in config.model_fields, key
            annotation = config.model_fields[part].annotation
            config = annotation if isinstance(annotation, type) else config  # type: ignore[assignment]


def test_overrides_in_commands_are_valid() -> None:
    found = [
        (words[i + 1], [word for word in words[i + 2 :] if re.match(r"[a-z_.]+=", word)])
        for block in COMMANDS
        for line in block.replace("\\\n", " ").splitlines()
        for words in [re.sub("[;']", " ", line).split()]
        for i, word in enumerate(words)
        if word in ("train.py", "train")
    ]
    assert len(found) == 5
    for yaml, overrides in found:
        assert overrides
        load_config(RunConfig, ROOT / yaml, overrides=overrides)


def test_the_launcher_takes_its_arguments() -> None:
    lines = COMMANDS[0].splitlines()
    ranks = []
    for line in lines:
        with patch.object(sys, "argv", shlex.split(line)):
            parsed = _parse_args()
        assert (parsed.nproc, parsed.world_size, parsed.master_addr, parsed.master_port) == (8, 16, "node0", 29500)
        ranks.append((parsed.node_rank, parsed.base_rank))
    assert ranks == [(0, 0), (1, 8)]


def test_the_batch_of_the_recipe_divides_among_the_gpus() -> None:
    found = re.search(r"batch_packs: (\d+) +# divides among ([\d, ]+) and (\d+) GPUs", PAGE)
    assert found is not None
    gpus = [int(number) for number in (*found[2].split(", "), found[3])]
    assert len(gpus) > 1
    assert [number for number in gpus if int(found[1]) % number] == []


# Shared memory of its own, which two machines have anyway: Streaming's names are unique on one machine alone.
AS_A_NODE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs none /dev/shm && exec "$@"',
    "sh",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_of_one_process_train_one_run(write_data_set: Callable[..., Path], tmp_path: Path) -> None:
    """One started by a launcher, the other by a task with the variables that the page's sbatch script sets."""
    if shutil.which("unshare") is None or subprocess.call([*AS_A_NODE, "true"], stderr=subprocess.DEVNULL):
        pytest.skip("this machine gives no process shared memory of its own")
    data = write_data_set(tmp_path / "data", {("web", 1, 16): 24})
    port = str(free_ports(1)[0])
    settings = [
        "train.py", "yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={tmp_path / 'run'}",
        "model.hidden_size=64", "model.num_layers=1", "data.batch_packs=4", "data.workers=0", "log.tensorboard=false",
    ]  # fmt: skip
    nodes = []
    for node in ("0", "1"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if node == "0":
            where = ["--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
            command = [str(Path(sys.executable).with_name("composer")), "-n", "1", "--world_size", "2", *where]
        else:
            command = [sys.executable]
            environment |= {
                "RANK": node, "LOCAL_RANK": "0", "NODE_RANK": node, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        command = [*AS_A_NODE, *command, *settings, f"data.cache={tmp_path / f'cache-{node}'}"]
        with open(tmp_path / f"{node}.log", "wb") as output:
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
    deadline = time.monotonic() + 600
    while any(node.poll() is None for node in nodes) and time.monotonic() < deadline:
        if any(node.poll() for node in nodes):  # the other would wait for it
            break
        time.sleep(0.2)
    for node in nodes:
        if node.poll() is None:
            node.terminate()
        node.wait(timeout=60)
    outputs = [(tmp_path / f"{node}.log").read_text() for node in (0, 1)]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "6 steps of 4 packs" in outputs[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
