"""streaming-rwkv: pre-train RWKV-7 from packed, length-bucketed MDS shards.

The names in `__all__` are the public interface (docs/python.md); everything else is internal and may change in any
release. Each is imported when it is used for the first time, so that `import streaming_rwkv` needs no torch.

Data flow, and direction of imports:

    prep → streaming_rwkv.{config, shards, tokenizer} ← data ← train → model → ops → kernels/

`shards` and `tokenizer` are the on-disk contract: they outlive the program that wrote the data, import neither
torch nor streaming, and are the only part of this package that `prep` knows.
"""

from typing import TYPE_CHECKING

from streaming_rwkv.public import import_when_used
from streaming_rwkv.version import __version__ as __version__

__all__ = [
    "RWKV7",
    "Batch",
    "Manifest",
    "MixtureConfig",
    "RWKV7Config",
    "StageConfig",
    "StepDataset",
    "Tokenizer",
    "UserError",
    "generate",
    "initialize",
    "load_model",
    "load_tokenizer",
    "open_dataset",
    "read_manifest",
    "wkv7",
]

if TYPE_CHECKING:
    from streaming_rwkv.data.batch import Batch
    from streaming_rwkv.data.mixture import MixtureConfig, StageConfig
    from streaming_rwkv.data.steps import StepDataset, open_dataset
    from streaming_rwkv.errors import UserError
    from streaming_rwkv.inference.models import load_model
    from streaming_rwkv.inference.text import generate
    from streaming_rwkv.model.config import RWKV7Config
    from streaming_rwkv.model.init import initialize
    from streaming_rwkv.model.rwkv7 import RWKV7
    from streaming_rwkv.ops.time_mixing import wkv7
    from streaming_rwkv.shards import Manifest, read_manifest
    from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
else:
    import_when_used(
        __name__,
        {
            "Batch": "streaming_rwkv.data.batch",
            "Manifest": "streaming_rwkv.shards",
            "MixtureConfig": "streaming_rwkv.data.mixture",
            "RWKV7": "streaming_rwkv.model.rwkv7",
            "RWKV7Config": "streaming_rwkv.model.config",
            "StageConfig": "streaming_rwkv.data.mixture",
            "StepDataset": "streaming_rwkv.data.steps",
            "Tokenizer": "streaming_rwkv.tokenizer",
            "UserError": "streaming_rwkv.errors",
            "generate": "streaming_rwkv.inference.text",
            "initialize": "streaming_rwkv.model.init",
            "load_model": "streaming_rwkv.inference.models",
            "load_tokenizer": "streaming_rwkv.tokenizer",
            "open_dataset": "streaming_rwkv.data.steps",
            "read_manifest": "streaming_rwkv.shards",
            "wkv7": "streaming_rwkv.ops.time_mixing",
        },
    )
