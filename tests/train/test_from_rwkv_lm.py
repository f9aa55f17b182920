"""docs/from_rwkv_lm.md: its YAML loads, and its settings exist and say what the page says."""

from __future__ import annotations

import re
from pathlib import Path

from prep.config import PrepConfig
from streaming_rwkv.config import load_config
from streaming_rwkv.train.config import RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "from_rwkv_lm.md").read_text(encoding="utf-8")
RECIPE, RUN = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
SETTING = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)*=[^`]+?(?= [a-z_.]+=|`)")


def test_the_recipe_loads(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RECIPE)
    recipe = load_config(PrepConfig, tmp_path / "a.yaml")
    assert recipe.sources["minipile"].paths == ["data/minipile.idx"]
    assert (recipe.edges[-1], recipe.pack_tokens) == (512, 16 * 512)


def test_the_run_is_that_of_the_flags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RUN)
    run = load_config(RunConfig, tmp_path / "a.yaml")
    assert run.data.batch_tokens == 16 * 512
    assert run.optimizer.warmup_tokens == 10 * run.data.batch_tokens
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.weight_decay) == ((0.9, 0.99), 1e-18, 0.001)
    assert run.checkpoint.interval_steps * 16 == 40_320


def test_the_settings_of_the_table_are_those_of_the_yaml_or_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RUN)
    table = PAGE.partition("| `--n_layer")[2].partition("\n\n")[0]
    settings = [SETTING.findall(line.split(" | ")[1]) for line in table.splitlines()]
    overrides = [setting for of_line in settings for setting in of_line]
    assert len(overrides) == 15
    elsewhere = {"save_folder=out", "model.init_from=x.pth", "precision=amp_bf16"}
    same = [setting for setting in overrides if setting not in elsewhere]
    assert load_config(RunConfig, tmp_path / "a.yaml", overrides=same) == load_config(RunConfig, tmp_path / "a.yaml")
    # Weights to start from exclude a preset.
    load_config(RunConfig, tmp_path / "a.yaml", overrides=[*elsewhere, "model.preset=null"])
