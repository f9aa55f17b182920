"""S3-compatible object storage: `open_store` gives a `Store`; every request has a deadline and is checked."""

from streaming_rwkv.storage.store import (
    ObjectMissing,
    StorageError,
    Store,
    StoredObject,
    open_store,
)

__all__ = ["ObjectMissing", "StorageError", "Store", "StoredObject", "open_store"]
