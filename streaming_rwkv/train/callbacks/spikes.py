"""Spikes of the gradient's norm, as multiples of its running median."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence


class SpikeDetector:
    """The running median of the gradient's norm over the last `window` steps, and norms far above it.

    Norms of spikes are counted too: after half a window at a new level, that level is the median. Norms that are not
    finite are not counted.
    """

    def __init__(self, norm_over: float, *, window: int) -> None:
        self.norm_over = norm_over
        self.norms: deque[float] = deque(maxlen=window)

    def load(self, norms: Sequence[float]) -> None:
        """Continue after a checkpoint's norms."""
        self.norms.clear()
        self.norms.extend(norms)

    def spike(self, norm: float) -> float | None:
        """Count a step's norm; return the median before it if the norm is a spike.

        There is none until a quarter of the window has been seen: the first steps of a run have large norms.
        """
        enough = 4 * len(self.norms) >= (self.norms.maxlen or 1)
        median = statistics.median(self.norms) if enough and self.norms else math.inf
        if math.isfinite(norm):
            self.norms.append(norm)
        return median if norm > self.norm_over * median else None
