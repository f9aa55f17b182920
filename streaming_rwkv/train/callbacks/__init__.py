"""Composer callbacks of a training run."""
