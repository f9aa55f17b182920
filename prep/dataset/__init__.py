"""Data sets: writing and reading shards, and opening, verifying and uploading whole data sets."""
