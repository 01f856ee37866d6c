"""Orders: in which sequence the T cells of a grid are visited. Pure functions.

    order[s] = raster position visited at step s       rank[p] = step at which p is visited
    rank = order.argsort()                             order = rank.argsort()

The scans are those of taming-transformers' permuter (Esser et al., arXiv 2012.09841), which RAR
(Yu et al., arXiv 2411.00776) compares, and PAR's regions (Wang et al., arXiv 2412.15119). Group
sizes are RandAR's (Pang et al., arXiv 2412.01827) and ARPG's (Li et al., arXiv 2503.10568).

A policy says which orders a training sees: one scan, random ones, or as much chance as the step
asks for. `anneal` is RAR's: random orders first, one fixed order last. With `adaptive` a share of
the cells of the raster order is shuffled, and the worse the calibration of the held-out codes, the
larger the share (github.com/lime413/randar).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from models.errors import InputError, expect_fraction

ScanName = Literal[
    "raster", "alternate", "z_curve", "subsample", "spiral_in", "spiral_out", "regions"
]
SCANS: tuple[ScanName, ...] = get_args(ScanName)
Grouping = Literal["cosine", "arpg_cosine", "arccos"]


def _bits(values: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [(values >> b) & 1 for b in range(count)]


def _spiral_out(grid: int) -> list[int]:
    """Start at the lower left of the central 2x2; arms up, right, down, left, ever longer."""
    row, column, order = grid // 2, grid // 2 - 1, []
    turns = ((-1, 0), (0, 1), (1, 0), (0, -1))
    arms = sorted([*range(1, grid)] * 2 + [grid - 1])  # 1 1 2 2 .. G-1 G-1 G-1
    for arm, length in enumerate(arms):
        down, right = turns[arm % 4]
        for _ in range(length):
            order.append(row * grid + column)
            row, column = row + down, column + right
    return [*order, row * grid + column]


def region_scan(grid: int, regions: int) -> torch.Tensor:
    """Return PAR's order_T: the same cell of every square region, before the next cell of any.

    `regions` is PAR's n. Raises InputError unless it is the square of a divisor of `grid`.
    """
    side = math.isqrt(regions)
    if regions < 1 or side * side != regions or grid % side:
        raise InputError(
            f"expected the number of regions to be the square of a divisor of {grid}, got {regions}"
        )
    cells = torch.arange(grid * grid).view(side, grid // side, side, grid // side)
    return cells.permute(1, 3, 0, 2).reshape(-1)


def scan(name: ScanName, grid: int, regions: int = 4) -> torch.Tensor:
    """Return the order_T of a scan over a grid x grid square, int64; `regions` is PAR's n.

    Raises InputError for an unknown name, or for a side that the scan is not defined on
    (z_curve and subsample: powers of two; spirals and regions: even).
    """
    row_T, column_T = (
        torch.arange(grid * grid).div(grid, rounding_mode="floor"),
        torch.arange(grid * grid).remainder(grid),
    )
    levels = int(math.log2(grid))
    if name in ("z_curve", "subsample") and 2**levels != grid:
        raise InputError(f"{name} needs a grid side that is a power of two, got {grid}")
    if name in ("spiral_in", "spiral_out") and grid % 2:
        raise InputError(f"{name} needs an even grid side, got {grid}")
    pairs = list(zip(_bits(row_T, levels), _bits(column_T, levels), strict=True))
    if name == "raster":
        return row_T * grid + column_T
    if name == "alternate":
        return (row_T * grid + torch.where(row_T % 2 == 0, column_T, grid - 1 - column_T)).argsort()
    if name == "z_curve":
        return sum(c << 2 * b | r << 2 * b + 1 for b, (r, c) in enumerate(pairs)).argsort()
    if name == "subsample":
        return sum((2 * r + c) << 2 * (levels - 1 - b) for b, (r, c) in enumerate(pairs)).argsort()
    if name == "spiral_out":
        return torch.tensor(_spiral_out(grid))
    if name == "spiral_in":
        return torch.tensor(_spiral_out(grid)).flip(0)
    if name == "regions":
        return region_scan(grid, regions)
    raise InputError(f"expected an order of {', '.join(SCANS)}, got {name}")


def mixed_order(
    base_T: torch.Tensor, batch: int, random_fraction: float, generator: torch.Generator
) -> torch.Tensor:
    """Return order_BS, each row uniformly random with probability `random_fraction`, else `base_T`.

    0 is raster (or another scan), 1 is RandAR and ARPG, and RAR goes from 1 to 0 during training.
    """
    device = generator.device
    shape = (batch, len(base_T))
    random_BS = torch.rand(shape, generator=generator, device=device).argsort(1)
    is_random_B1 = torch.rand(batch, 1, generator=generator, device=device) < random_fraction
    return torch.where(is_random_B1, random_BS, base_T.to(device))


def shuffled_order(
    base_T: torch.Tensor, batch: int, share: float, generator: torch.Generator
) -> torch.Tensor:
    """Return order_BS: `base_T` with a share of its cells, drawn for each row, in shuffled places.

    round(share * T) cells change places among themselves; 0 is `base_T`, 1 a random order.
    """
    device = generator.device
    shape = (batch, len(base_T))
    drawn_Bm = torch.rand(shape, generator=generator, device=device).argsort(1)
    drawn_Bm = drawn_Bm[:, : round(share * len(base_T))]
    base_T = base_T.to(device)
    return base_T.expand(shape).scatter(1, drawn_Bm.sort(1).values, base_T[drawn_Bm])


def random_fraction_at(progress: float, start: float, end: float) -> float:
    """Return RAR's share of random orders: 1 until `start`, then linear to 0 at `end`.

    All three are fractions of the training.
    """
    if progress <= start:
        return 1.0
    if progress >= end:
        return 0.0
    return 1 - (progress - start) / (end - start)


def groups_of(tokens: int, steps: int, grouping: Grouping) -> list[int]:
    """Return how many codes each step decodes: `steps` sizes >= 1, sum `tokens`.

    cosine is RandAR's schedule, arpg_cosine and arccos are ARPG's. Raises InputError unless
    1 <= steps <= tokens.
    """
    if not 1 <= steps <= tokens:
        raise InputError(f"expected steps in 1..{tokens}, got {steps}")
    if grouping == "cosine":
        return cosine_groups(tokens, steps)
    return arpg_groups(tokens, steps, grouping)


def arpg_groups(tokens: int, steps: int, curve: Grouping) -> list[int]:
    """Return ARPG's group sizes: `arccos` is flat with a large last step, `arpg_cosine` grows."""
    sizes, done = [], 0
    for step in range(1, steps):
        if curve == "arccos":
            ratio = (2 / math.pi) * math.acos(step / steps)
        else:
            ratio = math.cos((math.pi / 2) * step / steps)
        left = max(1, min(tokens - done - 1, math.floor(tokens * ratio)))
        sizes.append(tokens - done - left)
        done += sizes[-1]
    return [*sizes, tokens - done]


def cosine_groups(tokens: int, steps: int) -> list[int]:
    """Return how many codes each step decodes, few first: RandAR's schedule for steps >= 2.

    The float64 order of operations is part of it: at (t + 1) / steps = 2/3 the cosine hits
    tokens / 2, and another order gives other sizes. One step decodes everything (RandAR's formula
    would need two).
    """
    if steps == 1:
        return [tokens]
    done = [0, 1]
    for t in range(1, steps):
        target = math.floor((1 - math.cos((math.pi / 2) * (t + 1) / steps)) * tokens + 1)
        done.append(min(tokens, max(done[-1] + 1, target)))
    return [after - before for before, after in itertools.pairwise(done)]


OrderName = Literal[(*SCANS, "random", "anneal", "adaptive")]


@dataclass(frozen=True)
class Anneal:
    """How --order anneal goes from random orders to a fixed one, as RAR (arXiv 2411.00776)."""

    start: float = 0.5
    """share of the training with random orders only"""
    end: float = 0.75
    """share of the training after which the order is fixed"""
    to: ScanName = "raster"
    """the order it ends in"""

    def check(self) -> None:
        """Raise InputError for an end before the start."""
        expect_fraction(self, "start", "end")
        if self.start > self.end:
            raise InputError(
                f"expected --anneal.start <= --anneal.end, got {self.start} and {self.end}"
            )


@dataclass(frozen=True)
class Adaptive:
    """How --order adaptive shuffles: raster at a held-out token ECE of 0, more as that grows."""

    most: float = 1.0
    """largest share of an image's cells that is shuffled among themselves"""
    threshold: float = 0.05
    """ECE (15 bins of equal width, raster order) from which on `most` are shuffled"""

    def check(self) -> None:
        """Raise InputError for a share outside [0, 1], or a threshold that is not above 0."""
        if not 0 <= self.most <= 1:
            raise InputError(f"expected --adaptive.most in [0, 1], got {self.most}")
        if self.threshold <= 0:
            raise InputError(f"expected --adaptive.threshold > 0, got {self.threshold}")

    def share(self, ece: float) -> float:
        """Return the share of shuffled cells at an ECE."""
        return min(1.0, ece / self.threshold) * self.most


@dataclass(frozen=True)
class OrderPolicy:
    """An --order with what it needs: the orders of every step of a training."""

    name: OrderName
    anneal: Anneal
    adaptive: Adaptive

    @property
    def scan(self) -> ScanName:
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
