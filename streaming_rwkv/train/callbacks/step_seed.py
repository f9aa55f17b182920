"""Random seed of each step."""

from __future__ import annotations

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from streaming_rwkv.distributed import rank


class StepSeed(Callback):
    """Seed the random numbers of each step by seed, step and rank, so that no state has to be saved or restored."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        entropy = np.random.SeedSequence([self.seed, int(state.timestamp.batch), rank()])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
