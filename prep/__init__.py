"""Raw corpora to packed, length-bucketed MDS shards: `python -m prep build yamls/prep/NAME.yaml`."""
