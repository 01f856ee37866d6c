"""Which orders a training sees: one scan, random ones, or as much chance as the step asks for.

`anneal` is RAR's (Yu et al., arXiv 2411.00776): random orders first, one fixed order last. With
`adaptive` a share of the cells of the raster order is shuffled, and the worse the calibration of
the held-out codes, the larger the share (github.com/lime413/randar).
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from models import command
from models.orders import ScanName, mixed_order, random_fraction_at, shuffled_order


@dataclass(frozen=True)
class Anneal:
    """How --order anneal goes from random orders to a fixed one, as RAR (arXiv 2411.00776)."""

    start: command.Fraction = 0.5
    """share of the training with random orders only"""
    end: command.Fraction = 0.75
    """share of the training after which the order is fixed"""
    to: ScanName = "raster"
    """the order it ends in"""


@dataclass(frozen=True)
class Adaptive:
    """How --order adaptive shuffles: raster at a held-out token ECE of 0, more as that grows."""

    most: command.Share = 1.0
    """largest share of an image's cells that is shuffled among themselves"""
    threshold: Annotated[float, command.Range(1e-6, 1)] = 0.05
    """ECE (15 bins of equal width, raster order) from which on `most` are shuffled"""

    def share(self, ece: float) -> float:
        """Return the share of shuffled cells at an ECE."""
        return min(1.0, ece / self.threshold) * self.most


@dataclass(frozen=True)
class OrderPolicy:
    """An --order with what it needs: the orders of every step of a training."""

    name: str
    """of ORDERS, fixed_random, random, anneal, adaptive, or the path of an .npy"""
    anneal: Anneal
    adaptive: Adaptive

    @property
    def scan(self) -> str:
        """The order without chance, where the policy starts from or ends in."""
        if self.name == "anneal":
            return self.anneal.to
        return "raster" if self.name in ("random", "adaptive") else self.name

    @property
    def asked(self) -> str:
        """The order to measure and to sample in: `random` if it is all random, else the scan."""
        return "random" if self.name == "random" else self.scan

    def draw(
        self,
        base_T: torch.Tensor,
        batch: int,
        progress: float,
        ece: float,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return order_BS of one step.

        base_T is the order of `scan`, `progress` the share of the training that is over, and `ece`
        the last one measured on held-out codes, 0 before the first (only `adaptive` looks at it).
        """
        if self.name == "adaptive":
            return shuffled_order(base_T, batch, self.adaptive.share(ece), generator)
        share = float(self.name == "random")
        if self.name == "anneal":
            share = random_fraction_at(progress, self.anneal.start, self.anneal.end)
        return mixed_order(base_T, batch, share, generator)
