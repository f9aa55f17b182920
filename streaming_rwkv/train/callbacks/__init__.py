"""Composer callbacks of a training run, one per file; `build.py` assembles them."""
