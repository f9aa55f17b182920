"""Execution of stages: processes or Ray, the task store, intermediate files, resuming, and progress."""
