"""The program's name, as messages tell it, and its version, of which `docs/versions.md` explains the parts."""

PROGRAM = "streaming-rwkv"
__version__ = "0.1.0"
