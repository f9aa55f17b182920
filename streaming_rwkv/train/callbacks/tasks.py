"""Standard tasks at evaluations: `tasks/NAME/acc` and so on, as `evaluate --tasks` finds them.

lm-evaluation-harness works on rank 0, and its requests are spread over the ranks. It is an extra, and takes seconds to
import, so that only runs with tasks do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.fsdp import register_fsdp_forward_method

from streaming_rwkv.distributed import is_rank_zero
from streaming_rwkv.model.sharding import release_weights
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer
from streaming_rwkv.train.composer_model import RWKV7ForTraining
from streaming_rwkv.train.config import EvaluationConfig

if TYPE_CHECKING:
    from streaming_rwkv.inference.tasks import Tasks


def load_tasks(config: EvaluationConfig) -> Tasks | None:
    """Return the configured tasks with their data, or None if there are none.

    Raises:
        TaskError: a task does not exist, or its data cannot be read.
    """
    if not config.tasks:
        return None
    from streaming_rwkv.inference.tasks import Tasks

    return Tasks(
        config.tasks,
        folder=Path(config.task_folder) if config.task_folder is not None else None,
        limit=config.task_limit,
        option="evaluation.tasks:",
        folder_option="evaluation.task_folder",
    )


class TaskScores(Callback):
    """Log the scores of tasks at evaluations; weights and random numbers stay as they are."""

    def __init__(
        self, config: EvaluationConfig, tasks: Tasks | None, *, tokenizer_folder: Path, last_step: int
    ) -> None:
        """Configure the callback.

        Args:
            tasks: None on ranks other than 0.
            tokenizer_folder: read on rank 0.
        """
        self.interval_steps = config.task_interval_steps or config.interval_steps
        self.tasks = tasks
        self.tokenizer_folder = tokenizer_folder
        self.last_step = last_step
        self.tokenizer: Tokenizer | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        assert isinstance(state.model, RWKV7ForTraining)
        register_fsdp_forward_method(state.model.network, "step")  # no effect if the network is not sharded
        if is_rank_zero():
            self.tokenizer = load_tokenizer(self.tokenizer_folder)

    def eval_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval_steps and step != self.last_step:
            return
        from streaming_rwkv.inference.tasks import measure_on_all_ranks

        assert isinstance(state.model, RWKV7ForTraining)
        metrics = measure_on_all_ranks(state.model.network, self.tasks, self.tokenizer)
        release_weights(state.model)
        logger.log_metrics(metrics)
