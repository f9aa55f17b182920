"""Commands: one module for each command of `python -m prep`; `run` takes its parsed arguments."""
