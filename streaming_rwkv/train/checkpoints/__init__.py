"""Checkpoints on disk and in object storage: saving, finding, fetching, restoring, pruning."""
