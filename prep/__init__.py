"""Raw corpora to packed, length-bucketed MDS shards: `streaming-rwkv prepare yamls/prep/NAME.yaml`.

The names in `__all__` are the public interface (docs/python.md); everything else is internal and may change in any
release. Nothing here needs torch.
"""

from typing import TYPE_CHECKING

from streaming_rwkv.public import import_when_used

__all__ = ["BuildResult", "PrepConfig", "Reject", "SourceConfig", "UploadResult", "build", "upload", "verify"]

if TYPE_CHECKING:
    from prep.build import BuildResult, build
    from prep.config import PrepConfig, SourceConfig
    from prep.dataset.upload import UploadResult, upload
    from prep.dataset.verification import verify
    from prep.inputs.faults import Reject
else:
    import_when_used(
        __name__,
        {
            "BuildResult": "prep.build",
            "PrepConfig": "prep.config",
            "Reject": "prep.inputs.faults",
            "SourceConfig": "prep.config",
            "UploadResult": "prep.dataset.upload",
            "build": "prep.build",
            "upload": "prep.dataset.upload",
            "verify": "prep.dataset.verification",
        },
    )
