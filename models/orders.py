"""Orders: in which sequence the T cells of a grid are visited. Pure functions.

    order[s] = raster position visited at step s       rank[p] = step at which p is visited
    rank = order.argsort()                             order = rank.argsort()

The scans are those of taming-transformers' permuter (Esser et al., arXiv 2012.09841), which RAR
(Yu et al., arXiv 2411.00776) compares, and PAR's regions (Wang et al., arXiv 2412.15119).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from models.artifacts import map_array
from models.command import InputError


def _rows_columns(grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row_T, column_T) of the cells in raster order."""
    cell_T = torch.arange(grid * grid)
    return cell_T // grid, cell_T % grid


def raster(grid: int) -> torch.Tensor:
    """Row by row, from the left."""
    return torch.arange(grid * grid)


def column(grid: int) -> torch.Tensor:
    """Column by column, from the top."""
    return torch.arange(grid * grid).view(grid, grid).T.flatten()


def diagonal(grid: int) -> torch.Tensor:
    """The diagonals that go up to the right, each from its top, starting at the upper left."""
    row_T, column_T = _rows_columns(grid)
    return ((row_T + column_T) * grid + row_T).argsort()


def alternate(grid: int) -> torch.Tensor:
    """Row by row, every second one from the right."""
    cells = torch.arange(grid * grid).view(grid, grid)
    cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()


def _by_bits(grid: int, name: str, lowest_first: bool) -> torch.Tensor:
    """Return order_T by the interleaved bits of row and column, the first ones changing last."""
    levels = grid.bit_length() - 1
    if 2**levels != grid:
        raise InputError(f"{name} needs a grid side that is a power of two, got {grid}")
    bits = [(b, levels + b) for b in range(levels)]  # of row and column, highest first
    axes = [axis for pair in (reversed(bits) if lowest_first else bits) for axis in pair]
    return torch.arange(grid * grid).view([2] * 2 * levels).permute(axes).flatten()


def z_curve(grid: int) -> torch.Tensor:
    """Quadrant by quadrant, and so within each."""
    return _by_bits(grid, "z_curve", lowest_first=False)


def subsample(grid: int) -> torch.Tensor:
    """The same place of every 2x2 block of blocks, before the next place of any."""
    return _by_bits(grid, "subsample", lowest_first=True)


def spiral_in(grid: int) -> torch.Tensor:
    """Start at the lower right; arms up, left, down, right, ever shorter, to the central 2x2."""
    if grid % 2:
        raise InputError(f"spirals need an even grid side, got {grid}")
    cells, arms = torch.arange(grid * grid).view(grid, grid), []
    while len(cells):
        arms.append(cells[:, -1].flip(0))  # the column at the right, from below
        cells = cells[:, :-1].rot90(-1)  # what is left, its top row now at the right
    return torch.cat(arms)


def spiral_out(grid: int) -> torch.Tensor:
    """`spiral_in` backwards: it starts at the lower left of the central 2x2."""
    return spiral_in(grid).flip(0)


def halton(grid: int) -> torch.Tensor:
    """Cells as the points of Halton's sequence first fall on them (bases 2 and 3): spread evenly.

    As Halton-MaskGIT (Besnier et al., arXiv 2503.17076).
    """
    order, point = {}, 0
    while len(order) < grid * grid:
        point += 1
        digits = [np.base_repr(point, base)[::-1] for base in (2, 3)]
        # mirrored at the point, in integers: 1/3 + 2/9 in floats can fall short of its cell
        row, column = (int(x, b) * grid // b ** len(x) for x, b in zip(digits, (2, 3), strict=True))
        order.setdefault(row * grid + column)
    return torch.tensor(list(order))


def multiscale(grid: int) -> torch.Tensor:
    """Coarse to fine: every 2^k-th row and column, k falling to 0, each lattice in raster order."""
    row_T, column_T = _rows_columns(grid)
    place_T = row_T | column_T
    level_T = torch.where(place_T == 0, 1 << 30, place_T & -place_T)  # lowest bit that is set
    return level_T.argsort(descending=True, stable=True)


def checkerboard(grid: int) -> torch.Tensor:
    """The cells of one colour, then those of the other, in raster order."""
    row_T, column_T = _rows_columns(grid)
    return ((row_T + column_T) % 2).argsort(stable=True)


def region_scan(grid: int, regions: int = 4) -> torch.Tensor:
    """Return PAR's order_T: the same cell of every square region, before the next cell of any.

    `regions` is PAR's n. Raises InputError unless it is the square of a divisor of `grid`.
    """
    side = math.isqrt(max(regions, 0))
    if regions < 1 or side * side != regions or grid % side:
        raise InputError(
            f"expected the number of regions to be the square of a divisor of {grid}, got {regions}"
        )
    cells = torch.arange(grid * grid).view(side, grid // side, side, grid // side)
    return cells.permute(1, 3, 0, 2).reshape(-1)


ORDERS: dict[str, Callable[[int], torch.Tensor]] = {
    "raster": raster,
    "alternate": alternate,
    "z_curve": z_curve,
    "subsample": subsample,
    "spiral_in": spiral_in,
    "spiral_out": spiral_out,
    "regions": region_scan,
    "column": column,
    "diagonal": diagonal,
    "halton": halton,
    "multiscale": multiscale,
    "checkerboard": checkerboard,
}
"""The fixed orders by name: grid side -> order_T, int64. To add one: a function and a line here."""
SCANS = tuple(ORDERS)
ScanName = Literal[SCANS]
FIXED_RANDOM = "fixed_random"
Chosen = Literal["confidence", "entropy", "margin"]
CHOSEN = get_args(Chosen)
"""orders that a model chooses while it decodes: the cells first that it is surest of"""
CHANCE = ("random", "anneal", "adaptive")
"""policies that need a method which can be asked for any order"""
OrderName = Literal[(*SCANS, FIXED_RANDOM, *CHANCE)]


def scan(name: str | Path, grid: int, regions: int = 4, seed: int = 0) -> torch.Tensor:
    """Return an order_T by its name in ORDERS, `fixed_random`, or the path of an .npy that has it.

    `regions` is PAR's n, `seed` that of fixed_random. Raises InputError for an unknown name, a side
    that the order is not defined on, or a file without a permutation of the cells.
    """
    if name == FIXED_RANDOM:
        return torch.randperm(grid * grid, generator=torch.Generator().manual_seed(seed))
    if str(name).endswith(".npy"):
        return _read_order(Path(name), grid)
    if name not in ORDERS:
        names = ", ".join((*ORDERS, FIXED_RANDOM))
        raise InputError(f"expected an order of {names}, or an .npy file with one, got {name}")
    return ORDERS[name](grid, regions) if name == "regions" else ORDERS[name](grid)


def _read_order(path: Path, grid: int) -> torch.Tensor:
    """Return the permutation of 0..T-1 in an .npy."""
    order_T = map_array(path, "an order", "give an .npy of integers (T,)")
    cells = grid * grid
    if order_T.ndim != 1 or order_T.dtype.kind not in "iu" or sorted(order_T) != [*range(cells)]:
        raise InputError(f"{path}: expected each of 0..{cells - 1} once, integers of shape (T,)")
    return torch.from_numpy(order_T.astype(np.int64))


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
    drawn_BS = torch.rand(shape, generator=generator, device=device).argsort(1)
    drawn_Bm, base_T = drawn_BS[:, : round(share * len(base_T))], base_T.to(device)
    return base_T.expand(shape).scatter(1, drawn_Bm.sort(1).values, base_T[drawn_Bm])


def sample_chance(
    seed: int, samples: range, tokens: int, *more: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (uniform_BS in [0, 1) float64, random order_BS int64), each sample its own stream.

    Row i depends on (seed, samples[i], more) only: an image does not depend on its batch.
    """
    streams = [np.random.default_rng([seed, sample, *more]) for sample in samples]
    uniform_BS = np.stack([stream.random(tokens) for stream in streams])
    order_BS = np.stack([stream.permutation(tokens) for stream in streams])
    return torch.from_numpy(uniform_BS), torch.from_numpy(order_BS)


def known_first(order_BS: torch.Tensor, open_T: torch.Tensor) -> torch.Tensor:
    """Return order_BS with the cells that are not open, bool (T,), before those that are."""
    return order_BS.gather(1, open_T[order_BS].int().argsort(dim=1, stable=True))


def doubtful_last(
    order_BS: torch.Tensor, log_p_BS: torch.Tensor, open_T: torch.Tensor, cells: int
) -> torch.Tensor:
    """Return order_BS with those `cells` of the open cells last that have the least log_p_BS."""
    log_p_BS = log_p_BS.masked_fill(~open_T[order_BS], math.inf)
    doubtful_BS = log_p_BS.argsort(1).argsort(1) < cells
    return order_BS.gather(1, doubtful_BS.int().argsort(dim=1, stable=True))


def random_fraction_at(progress: float, start: float, end: float) -> float:
    """Return RAR's share of random orders: 1 until `start`, then linear to 0 at `end`.

    All three are fractions of the training.
    """
    if progress <= start:
        return 1.0
    return 0.0 if progress >= end else 1 - (progress - start) / (end - start)


@dataclass(frozen=True)
class Choice:
    """How a method chooses the cells that it writes next, among all that are open."""

    policy: Chosen
    temperature: float
    uniform_BkT: torch.Tensor
    noise_BkT: torch.Tensor
    """what the codes of step k are drawn by, in [0, 1), and Gumbel noise, float64"""

    def __call__(self, step: int, logits_BlV: torch.Tensor, codes_Bl: torch.Tensor) -> torch.Tensor:
        """Return the places of the open cells, (B, l), those first that the model is surest of.

        confidence: log p of the code drawn (MaskGIT, arXiv 2202.04200), entropy: less of it,
        margin: between the two likeliest. The noise fades with what is open, as MaskGIT's.
        """
        log_p_BlV = logits_BlV.log_softmax(-1)
        p_BlV = log_p_BlV.exp()
        if self.policy == "confidence":
            sure_Bl = log_p_BlV.gather(2, codes_Bl.unsqueeze(2)).squeeze(2)
        elif self.policy == "margin":
            sure_Bl = -p_BlV.topk(2).values.diff().squeeze(2)
        else:
            sure_Bl = (p_BlV * log_p_BlV).sum(-1)
        share = codes_Bl.shape[1] / self.noise_BkT.shape[2]
        noise_Bl = self.temperature * share * self.noise_BkT[:, step, : codes_Bl.shape[1]]
        return (sure_Bl.double() + noise_Bl).argsort(1, descending=True)

    @classmethod
    def of(cls, policy: Chosen, temperature: float, seed: int, samples: range, shape, device):
        """Return the choice of samples, each with a stream of its own; shape: (steps, tokens)."""
        streams = (np.random.default_rng([seed, sample, 2]) for sample in samples)
        chance = zip(*((one.random(shape), one.gumbel(size=shape)) for one in streams), strict=True)
        return cls(policy, temperature, *(torch.from_numpy(np.stack(x)).to(device) for x in chance))
