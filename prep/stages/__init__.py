"""The stages from documents to packs: tokenization, deduplication, packing, assembly."""
