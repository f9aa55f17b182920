"""Commands: one module for each command on data sets; `run` takes its parsed arguments."""
