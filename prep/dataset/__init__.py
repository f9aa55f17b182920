"""A finished data set: writing and reading its shards, opening, verifying and uploading it."""
