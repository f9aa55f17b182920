"""Generate docs/settings.md: all settings of a run, as the configuration classes declare them.

python -m tools.settings_page
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic_core import PydanticUndefined

from streaming_rwkv.config import Config, configs_within
from streaming_rwkv.model.config import Preset
from streaming_rwkv.train.config import RunConfig

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """\
# Settings of a run

Every key of a training YAML and of `key=value` on the command line. Generated from the classes that declare them by
`python -m tools.settings_page`; a test fails when the page is out of date. Settings of `prepare` are in
[`prep/config.py`](../prep/config.py).

Whole numbers are at most 2³¹ - 1, numbers of tokens 10¹⁵, and sizes 2⁶⁰ bytes.
"""
KINDS = {
    "NonNegativeCount": "int ≥ 0, '32k'",
    "PositiveCount": "int > 0, '32k'",
    "ByteCount": "int, '200gb'",
    "Count": "int, '32k'",
    "PositiveInt": "int > 0",
    "NonNegativeInt": "int ≥ 0",
    "PositiveFloat": "float > 0",
    "NonNegativeFloat": "float ≥ 0",
    "LoaderWorkers": "int ≥ 0, ≤ 128",
    "Seconds": "float > 0, ≤ 604800",
}
BOUNDS = {"gt": ">", "ge": "≥", "le": "≤", "min_length": "length ≥"}


def sections(config: type[Config], key: str = "") -> Iterator[tuple[str, type[Config]]]:
    """Each configuration below `config` with the key that leads there."""
    yield key, config
    for name, field in config.model_fields.items():
        for inner in configs_within(field.annotation):
            below = f"{key}.{name}" if key else name
            yield from sections(inner, f"{below}.N" if "list[" in str(field.annotation) else below)


def declared(config: type[Config]) -> dict[str, tuple[str, str]]:
    """Name → (type as it is written, the text below it), those of base classes too."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(config.__mro__):
        if not issubclass(base, Config):
            continue
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(parsed, ast.ClassDef)
        for node, after in zip(parsed.body, [*parsed.body[1:], ast.Pass()], strict=True):
            if isinstance(node, ast.AnnAssign):
                text = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                )
                found[ast.unparse(node.target)] = kind(node), " ".join(str(text).split())
    return found


def kind(node: ast.AnnAssign) -> str:
    text = ast.unparse(node.annotation).replace("'", "")
    for name, meaning in KINDS.items():
        text = text.replace(name, meaning)
    text = re.sub(r"\bPreset\b", f"Literal[{', '.join(get_args(Preset))}]", text)
    text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
    bounds = node.value.keywords if isinstance(node.value, ast.Call) else []
    more = [f"{BOUNDS[bound.arg]} {ast.unparse(bound.value)}" for bound in bounds if bound.arg in BOUNDS]
    return ", ".join([text.removesuffix(" | None"), *more])


def page() -> str:
    parts = [HEAD]
    for key, config in sections(RunConfig):
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        written = declared(config)
        for name, field in config.model_fields.items():
            type_text, text = written[name]
            default = "**required**" if field.default is PydanticUndefined else f"`{field.default}`"
            if configs_within(field.annotation):
                below = f"{key}.{name}" if key else name
                type_text, text = "section", text or f"see `{below}` below"
                default = "–" if isinstance(field.default, Config) else default
            default = "–" if field.default is None else default
            cells = [f"`{name}`", type_text, default, text]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        about = " ".join((config.__dict__.get("__doc__") or "").split("\n\n")[0].split())
        title = f"## `{key}`" if key else "## At the top"
        parts.append("\n".join([title, "", *([about, ""] if about else []), *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
