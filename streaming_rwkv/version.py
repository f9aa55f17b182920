"""Version of the package; `docs/versions.md` says what a change of each part means."""

__version__ = "0.1.0"
