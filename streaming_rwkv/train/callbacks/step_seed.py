"""Random seed of each step."""

from __future__ import annotations

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from streaming_rwkv.distributed import rank


class StepSeed(Callback):
    """Randomness of a step is a function of seed, step and rank: nothing to save, and nothing to forget to restore."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        entropy = np.random.SeedSequence([self.seed, int(state.timestamp.batch), rank()])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
