"""One YAML for a run: data and mixture, model, optimizer, evaluation, checkpoints, logs.

Importing this imports no torch, streaming or composer: a misspelt key is told in a second, not in twenty.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from streaming_rwkv.config import Config, LoadedConfig
from streaming_rwkv.data.mixture import StageConfig
from streaming_rwkv.location import checked_local, checked_location, is_remote
from streaming_rwkv.model.config import Preset


class OptimizerConfig(Config):
    """AdamW, gradient clipping and the learning rate's course."""

    lr: PositiveFloat = 6e-4
    """After warm-up."""
    lr_final: NonNegativeFloat = 6e-5
    """At the end."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: PositiveFloat = 1e-18
    weight_decay: NonNegativeFloat = 0.001
    """AdamW's, as `betas` and `eps`. The reference has 0.001 (MiniPile) to 0.1 (Pile)."""
    gradient_clip: PositiveFloat = 1.0
    """Largest norm of all gradients together."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which the rate rises from 1 % to `lr`, in a straight line."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine` falls from the end of the warm-up to the end of training; `wsd` (warm-up, stable, decay) stays at `lr`
    and falls in a straight line over the last `decay_tokens`."""
    decay_tokens: PositiveInt | None = Field(default=None)
    """For `wsd` alone."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final: found {self.lr_final}, above lr {self.lr}; the rate falls, it does not rise")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: found {list(self.betas)}, expected two numbers from 0 to below 1")
        if self.schedule == "wsd" and self.decay_tokens is None:
            raise ValueError("decay_tokens: schedule wsd needs it; a tenth to a fifth of all tokens is usual")
        if self.schedule != "wsd" and self.decay_tokens is not None:
            raise ValueError(f"decay_tokens: schedule {self.schedule} does not use it; leave it out, or choose wsd")
        return self


class DataConfig(Config):
    """Where the packs come from, and which of them a step sees."""

    path: str
    """Data set that `prep` built: a folder, or s3://bucket/prefix."""
    cache: str | None = None
    """Folder for downloaded and expanded shards; by default below the save folder."""
    cache_limit: int | None = None
    """At most so much of this data set on disk ('200gb', in powers of 1024), compressed and expanded; at least four of
    the largest shards of training and of validation. By default everything is kept."""
    stages: list[StageConfig] = Field(min_length=1)
    """Stretches of the run, one after another, each with one mixture: see docs/mixtures.md."""
    cycles: PositiveInt = 1
    """Go through all stages so many times, each time with its share of their tokens."""
    max_repeats: PositiveFloat = 4.0
    """Warn where a stream is seen more often than this."""
    batch_tokens: PositiveInt | None = None
    """Tokens of a step, rounded to whole packs for every process."""
    batch_packs: PositiveInt | None = None
    """Packs of a step, over all processes."""
    shuffle_block_shards: PositiveInt = 4
    """Packs of a stream mix within so many shards."""
    workers: int = Field(default=2, ge=0)
    """Loader processes for each rank; 0 loads in the training process."""
    fetch_ahead: PositiveInt = 64
    """Packs that each worker looks ahead for shards to download."""
    download_attempts: PositiveInt = 3
    """For a data set in a folder; for s3:// attempts are counted by time alone."""
    timeout_seconds: PositiveFloat = 120.0
    """Stop the run when a download got nowhere for so long."""

    _location = field_validator("path")(checked_location)

    @field_validator("cache")
    @classmethod
    def _local(cls, folder: str | None) -> str | None:
        return None if folder is None else checked_local(folder)

    @field_validator("cache_limit", mode="before")
    @classmethod
    def _in_bytes(cls, limit: Any) -> Any:
        if not isinstance(limit, str):
            return limit
        from streaming.base.util import bytes_to_int

        try:
            return bytes_to_int(limit)
        except ValueError:
            raise ValueError(f"found {limit!r}; expected a number of bytes, or one with kb, mb, gb, tb") from None

    @model_validator(mode="after")
    def _one_batch_size(self) -> DataConfig:
        if (self.batch_tokens is None) == (self.batch_packs is None):
            raise ValueError("give either `batch_tokens` or `batch_packs`")
        return self


class ModelConfig(Config):
    """Shape of the network; give `preset`, or `hidden_size` and `num_layers`. See `model.config.RWKV7Config`."""

    preset: Preset | None = None
    """A released size; it decides everything of the shape but the vocabulary."""
    hidden_size: PositiveInt | None = None
    """A multiple of the head size."""
    num_layers: PositiveInt | None = None
    head_size: PositiveInt | None = None
    """64 if not given, as the released models and the fused kernels have it."""
    ffn_size: PositiveInt | None = None
    """Width of the channel mixing; 4 times the hidden size if not given."""
    decay_rank: PositiveInt | None = None
    """Of the LoRAs, as the next three; by the reference trainer's formula if not given."""
    a_rank: PositiveInt | None = None
    v_rank: PositiveInt | None = None
    gate_rank: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    """Rows of embedding and head; by default the tokenizer's."""
    activation_checkpointing: bool = False
    """Keep the input of each block alone, and compute the rest again in the backward pass."""
    loss_chunk_tokens: PositiveInt = 2048
    """So many tokens' logits exist at once when the loss is computed."""
    init_from: str | None = None
    """Weights to start from: a BlinkDL .pth, a Hugging Face folder, or a training run or checkpoint, also on s3://."""

    @field_validator("init_from")
    @classmethod
    def _location(cls, location: str | None) -> str | None:
        return None if location is None else checked_location(location)


class EvaluationConfig(Config):
    interval_steps: PositiveInt = 500
    """Every so many steps, and at the end."""
    packs_per_stream: PositiveInt | None = None
    """Only the first so many packs of each validation stream; by default all."""
    microbatch_packs: PositiveInt | None = None
    """Packs of one pass on each process; by default as in training where that is given, else 1."""
    prompts: list[str] = Field(default=[])
    """Texts to go on with at each evaluation, into samples.jsonl, TensorBoard and the console."""
    sample_tokens: PositiveInt = 64
    sample_temperature: NonNegativeFloat = 1.0
    """0 takes the likeliest token."""
    sample_top_p: float = Field(default=0.9, gt=0, le=1)


class CheckpointConfig(Config):
    interval_steps: PositiveInt = 500
    """Every so many steps, and at the end."""
    keep: int = Field(default=3, ge=0)
    """So many on disk, the newest; 0 keeps all."""
    allow_changed: list[Literal["batch_packs", "data", "mixture", "model", "optimizer", "order", "tokenizer"]] = Field(
        default=[]
    )
    """Settings that may differ from the checkpoint's, by the names that a refusal gives."""
    upload_timeout_seconds: PositiveFloat = 300.0
    """Stop the run when an upload to `save_remote` got nowhere for so long."""


class WandbConfig(Config):
    """Weights & Biases; `entity` and whatever else is not given are those of the environment or the login."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    """By default the save folder's."""
    tags: list[str] = Field(default=[])


class MlflowConfig(Config):
    """MLflow; what is not given is as its environment variables say."""

    experiment_name: str | None = None
    run_name: str | None = None
    """By default the save folder's."""
    tracking_uri: str | None = None
    """A server, or a folder's file store; by default MLFLOW_TRACKING_URI."""
    tags: dict[str, str] = Field(default={})
    log_system_metrics: bool = False

    @field_validator("tracking_uri")
    @classmethod
    def _without_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise ValueError(
                "holds a user name or a password, and this configuration is saved with the run; give them as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class LogConfig(Config):
    interval_steps: PositiveInt = 10
    """Lines on the console, throughput and shares consumed come every so many steps."""
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    progress_bar: bool = False


class RunConfig(LoadedConfig):
    save_folder: str
    """Folder for checkpoints, metrics and logs; a run that is started again with it goes on."""
    save_remote: str | None = None
    """s3://bucket/prefix: checkpoints and logs go there too, and an empty machine goes on from there."""
    seed: int = Field(default=17, ge=0)
    """Of the weights and of the order of packs."""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "amp_bf16"] | None = None
    """By default bf16 with fp32 master weights on a GPU, fp32 on the CPU."""
    microbatch_packs: PositiveInt | Literal["auto"] | None = None
    """Packs of one forward and backward pass on each process; by default all of the process's. With `auto` on a GPU as
    many as fit, found by trial before the first step; on the CPU all."""
    device: Literal["cpu", "gpu"] | None = None
    """By default a GPU where there is one."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose gradient is not finite."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("save_folder")
    @classmethod
    def _local(cls, folder: str) -> str:
        return checked_local(
            folder, remedy="name the run's place in object storage with `save_remote`, beside a local `save_folder`"
        )

    @field_validator("save_remote")
    @classmethod
    def _in_object_storage(cls, location: str | None) -> str | None:
        if location is None:
            return None
        if not is_remote(location):
            raise ValueError(f"found {location!r}; expected s3://bucket/prefix (`save_folder` is the local folder)")
        return checked_location(location)
