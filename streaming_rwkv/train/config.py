"""Settings of a run, one YAML: data and mixture, model, optimizer, evaluation, checkpoints, logs.

This module imports no torch, streaming or composer, so a misspelt key is reported within a second.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from streaming_rwkv.config import Config, LoadedConfig
from streaming_rwkv.data.mixture import StageConfig
from streaming_rwkv.location import checked_local, checked_location, is_remote
from streaming_rwkv.model.config import Preset
from streaming_rwkv.quantities import ByteCount, LoaderWorkers, NonNegativeCount, PositiveCount, PositiveInt, Seconds
from streaming_rwkv.version import PROGRAM


class OptimizerConfig(Config):
    """AdamW, gradient clipping and the learning-rate schedule."""

    lr: PositiveFloat = 6e-4
    """Learning rate after the warm-up."""
    lr_final: NonNegativeFloat = 6e-5
    """Learning rate at the end of training."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-18
    """AdamW's term that prevents division by zero."""
    weight_decay: NonNegativeFloat = 0.001
    """AdamW's decoupled weight decay. The reference trainer uses 0.001 (MiniPile) to 0.1 (Pile)."""
    gradient_clip: PositiveFloat = 1.0
    """Largest norm of the gradient of all parameters; a larger gradient is scaled down to it."""
    warmup_tokens: NonNegativeCount = 0
    """Tokens over which the rate rises linearly from 1 % of `lr` to `lr`."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine` falls from the end of the warm-up to the end of training; `wsd` (warm-up, stable, decay) stays at `lr`
    and falls linearly over the last `decay_tokens`."""
    decay_tokens: PositiveCount | None = None
    """Length of the decay; only for `wsd`."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final: found {self.lr_final}, above lr {self.lr}; the rate must not rise")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: found {list(self.betas)}, expected two numbers from 0 to below 1")
        if self.schedule == "wsd" and self.decay_tokens is None:
            raise ValueError("decay_tokens: schedule wsd needs it; use a tenth to a fifth of all tokens")
        if self.schedule != "wsd" and self.decay_tokens is not None:
            raise ValueError(f"decay_tokens: schedule {self.schedule} does not use it; leave it out, or choose wsd")
        return self


class DataConfig(Config):
    """Data set, mixture and batch size, and how shards are fetched."""

    path: str
    """Data set that `prep` built: a folder, or s3://bucket/prefix."""
    cache: str | None = None
    """Folder for downloaded and decompressed shards; by default in the save folder."""
    cache_limit: ByteCount | None = None
    """Largest size of the cached shards, compressed and decompressed ('200gb', in powers of 1024); at least four of the
    largest shards of training and of validation. By default all shards are kept."""
    stages: list[StageConfig] = Field(min_length=1)
    """Stages of the curriculum, one after another, each with its own mixture; see docs/mixtures.md."""
    cycles: int = Field(default=1, gt=0, le=1000)
    """Number of times that the stages are repeated, each time with an equal part of their tokens or passes."""
    max_repeats: PositiveFloat = 4.0
    """Number of passes over a stream above which a warning is shown."""
    batch_tokens: PositiveCount | None = None
    """Tokens per step ('32k' is 32,000), rounded to whole packs on every process. Give either this or `batch_packs`."""
    batch_packs: PositiveInt | None = None
    """Packs per step, over all processes."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of every stream's packs to train on, chosen by the seed: a small run then repeats data as a large one on all
    of it does. Validation is not reduced."""
    shuffle_block_shards: PositiveInt = 4
    """Number of shards in a shuffle block: packs of a stream are shuffled within a block."""
    workers: LoaderWorkers = 2
    """Loader processes per rank; 0 loads in the training process."""
    fetch_ahead: int = Field(default=64, gt=0, le=65536)
    """Packs that each worker looks ahead to fetch their shards."""
    download_attempts: PositiveInt = 3
    """Attempts to copy a shard of a local data set; downloads from s3:// are limited by `timeout_seconds` alone."""
    timeout_seconds: Seconds = 120.0
    """Time without progress of a download after which the run stops."""
    skip_steps: list[tuple[PositiveInt, PositiveInt]] = Field(default=[])
    """Steps to leave out, as [first, last], both included, with the numbers of the log: their packs are read, but
    change neither weights nor moments."""

    _location = field_validator("path")(checked_location)

    @field_validator("skip_steps")
    @classmethod
    def _first_to_last(cls, skipped: list[tuple[int, int]]) -> list[tuple[int, int]]:
        backwards = [[first, last] for first, last in skipped if first > last]
        if backwards:
            raise ValueError(f"found {backwards[0]}; expected [first, last], such as [158, 160]")
        return sorted(skipped)

    @field_validator("cache")
    @classmethod
    def _local(cls, folder: str | None) -> str | None:
        return None if folder is None else checked_local(folder)

    @model_validator(mode="after")
    def _one_batch_size(self) -> DataConfig:
        if (self.batch_tokens is None) == (self.batch_packs is None):
            raise ValueError("give either `batch_tokens` or `batch_packs`")
        return self


class ModelConfig(Config):
    """Shape of the network; give `preset`, or `hidden_size` and `num_layers`. See `model.config.RWKV7Config`."""

    preset: Preset | None = None
    """A released size; it determines the whole shape except the vocabulary."""
    hidden_size: PositiveInt | None = None
    """Width of the residual stream, a multiple of the head size."""
    num_layers: PositiveInt | None = None
    """Number of blocks."""
    head_size: PositiveInt | None = None
    """By default 64, the size of the released models and of the fused kernels."""
    ffn_size: PositiveInt | None = None
    """Width of the channel mixing; by default 4 times the hidden size."""
    decay_rank: PositiveInt | None = None
    """Rank of the LoRA of the decay; by default from the reference trainer's formula."""
    a_rank: PositiveInt | None = None
    """Rank of the LoRA of the in-context learning rate; default as above."""
    v_rank: PositiveInt | None = None
    """Rank of the LoRA of the value residual; default as above."""
    gate_rank: PositiveInt | None = None
    """Rank of the LoRA of the output gate; default as above."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding and the head; by default the tokenizer's vocabulary size."""
    activation_checkpointing: bool = False
    """Keep only the input of each block, and recompute the rest in the backward pass."""
    loss_chunk_tokens: PositiveCount = 2048
    """Chunk size, in tokens, of the cross-entropy; bounds the memory of the logits."""
    init_from: str | None = None
    """Weights to start from: a BlinkDL .pth, a Hugging Face folder, a training run or a checkpoint; local or on s3://."""

    @field_validator("init_from")
    @classmethod
    def _location(cls, location: str | None) -> str | None:
        return None if location is None else checked_location(location)


class EvaluationConfig(Config):
    """Validation loss, texts sampled from the model, and standard tasks."""

    interval_steps: PositiveInt = 500
    """Steps between evaluations; the last step is always evaluated."""
    packs_per_stream: PositiveInt | None = None
    """Number of packs of each validation stream to evaluate, from its beginning; by default all."""
    microbatch_packs: PositiveInt | None = None
    """Packs of one forward pass on each process; by default as in training if that is configured, otherwise 1."""
    prompts: list[str] = Field(default=[])
    """Prompts to complete at each evaluation; completions go to samples.jsonl, TensorBoard and the console."""
    sample_tokens: PositiveInt = 64
    """Number of tokens to generate for each prompt."""
    sample_temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    sample_top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the fewest tokens whose probabilities add up to at least this share."""
    tasks: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness to score at evaluations, such as [lambada_openai, piqa]; they need the extra
    `tasks`."""
    task_folder: str | None = None
    """Folder with task YAMLs of your own; see docs/evaluation.md."""
    task_limit: PositiveInt | None = None
    """Number of documents of each task, from its beginning; by default all."""
    task_interval_steps: PositiveInt | None = None
    """Steps between evaluations with tasks, a multiple of `interval_steps`; by default every evaluation has them. The
    last step always has them."""

    @field_validator("task_folder")
    @classmethod
    def _local(cls, folder: str | None) -> str | None:
        return None if folder is None else checked_local(folder)

    @model_validator(mode="after")
    def _tasks_come_with_evaluations(self) -> EvaluationConfig:
        tasks, interval = self.task_interval_steps, self.interval_steps
        if tasks is not None and tasks % interval:
            raise ValueError(
                f"task_interval_steps: found {tasks}, but evaluations come every {interval} steps (interval_steps); "
                f"give a multiple of that, such as {-(-tasks // interval) * interval}"
            )
        return self


class CheckpointConfig(Config):
    """Interval of checkpoints, and the number that is kept."""

    interval_steps: PositiveInt = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(default=3, ge=0)
    """Number of most recent checkpoints to keep; 0 keeps all."""
    keep_every: PositiveInt | None = None
    """Also keep the checkpoints of steps that are multiples of this; must be a multiple of `interval_steps`."""
    allow_changed: list[
        Literal["batch_packs", "data", "mixture", "model", "optimizer", "order", "skip_steps", "tokenizer"]
    ] = Field(default=[])
    """Settings that may differ from those of the checkpoint, by the names in the error that refuses it."""
    upload_timeout_seconds: Seconds = 300.0
    """Time without progress of an upload to `save_remote` after which the run stops."""

    @model_validator(mode="after")
    def _kept_steps_have_checkpoints(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.interval_steps:
            above = -(-self.keep_every // self.interval_steps) * self.interval_steps
            raise ValueError(
                f"keep_every: found {self.keep_every}, but checkpoints are written every {self.interval_steps} steps "
                f"(interval_steps); give a multiple of that, such as {above}"
            )
        return self


class WandbConfig(Config):
    """Weights & Biases; settings that are not given are taken from the environment or the login."""

    project: str | None = None
    """Project of the run."""
    entity: str | None = None
    """User or team that owns the project."""
    group: str | None = None
    """Group that the run is shown in."""
    name: str | None = None
    """Name of the run; by default the save folder's name."""
    tags: list[str] = Field(default=[])
    """Tags of the run."""


class MlflowConfig(Config):
    """MLflow; settings that are not given are taken from its environment variables."""

    experiment_name: str | None = None
    """Experiment of the run."""
    run_name: str | None = None
    """Name of the run; by default the save folder's name."""
    tracking_uri: str | None = None
    """URL of a server, or a folder for MLflow's file store; by default MLFLOW_TRACKING_URI."""
    tags: dict[str, str] = Field(default={})
    """Tags of the run."""
    log_system_metrics: bool = False
    """Log the use of CPU, GPU and memory."""

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
    """Metrics on the console, in TensorBoard and in trackers; metrics.jsonl is always written."""

    interval_steps: PositiveInt = 10
    """Steps between lines on the console, and between measurements of throughput and consumed shares."""
    tensorboard: bool = True
    """Write TensorBoard's event files into the save folder."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    progress_bar: bool = False
    """Show Composer's progress bar instead of lines; only on a terminal."""


class SpikeConfig(Config):
    """Reaction to a step whose gradient norm is far above the running median."""

    norm_over: float = Field(gt=1)
    """Multiple of the running median of the norm, before clipping, above which a step is a spike."""
    window: PositiveInt = 128
    """Number of last steps whose median is taken; there are no spikes before a quarter of them."""
    reaction: Literal["skip", "stop"] = "skip"
    """Skip the step, so that weights and moments stay as they are, or stop the run."""


class ProfileConfig(Config):
    """Traces of some steps, one for each rank, in `{save_folder}/profile`."""

    steps: tuple[PositiveInt, PositiveInt]
    """First and last step of the trace, with the numbers of the log."""
    memory: bool = False
    """Record the sizes of tensors too, and on CUDA a snapshot of the allocator's history."""

    @field_validator("steps")
    @classmethod
    def _first_to_last(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if steps[0] > steps[1]:
            raise ValueError(f"found {list(steps)}; expected [first, last], such as [20, 23]")
        return steps


class ParallelConfig(Config):
    """Division of weights, gradients and moments among the processes."""

    replicas: PositiveInt = 1
    """Number of copies of the weights, each sharded over an equal part of the processes (HSDP); 1 shards them over all
    processes (FSDP)."""


class RunConfig(LoadedConfig):
    """All settings of a run."""

    mistaken_for: ClassVar[tuple[frozenset[str], str]] = (
        frozenset({"out", "sources", "tokenizer", "pack_tokens", "edges"}),
        f"this is a recipe of a data set, not a training YAML; build it with `{PROGRAM} prepare {{path}}`, then train "
        "with a YAML such as yamls/tiny_cpu.yaml and data.path=",
    )

    save_folder: str
    """Folder for checkpoints, metrics and logs; a run that is started again with the same folder resumes."""
    save_remote: str | None = None
    """s3://bucket/prefix to which checkpoints and logs are also uploaded; an empty machine resumes from there."""
    branch_from: str | None = None
    """Checkpoint of another run to start from, with its moments, step and place in the data: `RUN@step-00010000`, or
    `RUN` for its newest; local or on s3://. Settings must be that run's but for those in `checkpoint.allow_changed`."""
    seed: int = Field(default=17, ge=0, le=2**31 - 1)
    """Random seed for weight initialization and data order."""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "amp_bf16"] | None = None
    """Precision of matrix products; by default bf16 with fp32 master weights on a GPU, fp32 on the CPU."""
    microbatch_packs: PositiveInt | Literal["auto"] | None = None
    """Packs of one forward and backward pass on each process; by default all packs of the process's share of a step.
    `auto` takes as many as fit on the GPU, found by trial before the first step; on the CPU it takes all."""
    device: Literal["cpu", "gpu"] | None = None
    """By default a GPU if there is one."""
    parallel: ParallelConfig = ParallelConfig()
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a step whose gradient is not finite: stop the run, or skip the step."""
    on_spike: SpikeConfig | None = None
    profile: ProfileConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("save_folder")
    @classmethod
    def _local(cls, folder: str) -> str:
        return checked_local(
            folder, remedy="set `save_remote` to the object storage, and `save_folder` to a local folder"
        )

    @field_validator("save_remote")
    @classmethod
    def _in_object_storage(cls, location: str | None) -> str | None:
        if location is None:
            return None
        if not is_remote(location):
            raise ValueError(f"found {location!r}; expected s3://bucket/prefix (`save_folder` is the local folder)")
        return checked_location(location)

    @field_validator("branch_from")
    @classmethod
    def _run_at_step(cls, location: str | None) -> str | None:
        if location is None:
            return None
        run, at, name = location.rpartition("@step-")
        if at and not re.fullmatch(r"\d{8,}", name):
            raise ValueError(f"found {location!r}; expected RUN@step-00010000, with the name of its checkpoint")
        return checked_location(run) + at + name if at else checked_location(location)

    @model_validator(mode="after")
    def _branch_has_its_own_folder(self) -> RunConfig:
        if self.branch_from is None:
            return self
        parent = self.branch_from.rpartition("@step-")[0] or self.branch_from
        for name, own in (("save_folder", self.save_folder), ("save_remote", self.save_remote)):
            if own is not None and _same_place(own, parent):
                raise ValueError(
                    f"branch_from: found {self.branch_from!r}, the run in `{name}` itself; a branch needs a "
                    f"`{name}` of its own"
                )
        return self


def _same_place(one: str, other: str) -> bool:
    if is_remote(one) or is_remote(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.abspath(one) == os.path.abspath(other)
