"""Optional packages: how to install them, and one line instead of a traceback where a program needs a missing one.

Nothing is imported here but the standard library: this runs where other packages are missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BASE = ("numpy", "omegaconf", "pydantic", "pyarrow")  # enough to recognize an environment without this project
TRAIN = ("torch", "streaming", "composer", "safetensors")


def install_command(extra: str = "") -> str:
    """Return the shell command that installs the project with one of its extras, for error messages."""
    what = f"'.[{extra}]'" if extra else "."
    return f"`pip install {what}` in a clone of streaming-rwkv"


def exit_if_missing(*packages: str, extra: str = "", is_reporting: bool = True) -> None:
    """End the program with an error of one line unless all packages are installed.

    For front ends, before they import the packages.

    Args:
        packages: import names.
        extra: the extra of this project that installs them; none for its base requirements.
        is_reporting: False for a rank that leaves the error to another.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing:
        return
    if not is_reporting:
        sys.exit(1)
    verb = "is" if len(missing) == 1 else "are"
    sys.exit(
        f"error: {', '.join(missing)} {verb} not installed for {sys.executable}; run {install_command(extra)}, "
        f"or activate the environment that has it{_environment_of_make()}"
    )


def _environment_of_make() -> str:
    """Return the command that activates the environment that `make` built in this clone, if there is one."""
    folder = Path(__file__).resolve().parents[1] / ".venv"
    if not (folder / "bin" / "activate").is_file() or folder == Path(sys.prefix).resolve():
        return ""
    return f": `. {folder}/bin/activate`"
