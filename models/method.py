"""What a method is: the four calls through which everything else sees it.

A method is one file with a subclass of `Method`, and one line in `models/methods.py`. The
tests in tests/test_methods.py are written over all of them.

All differ from their authors' code in: the order is an argument; known codes can be committed
first; the null label is put in by the training script; a last code that nothing reads is not fed,
with the same logits; logits are fp32 or wider in every mode; there is no stochastic depth. Group
sizes are RandAR's (Pang et al., arXiv 2412.01827) and ARPG's (Li et al., arXiv 2503.10568).
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from models import command
from models.command import InputError
from models.orders import SCANS, scan

Grouping = Literal["cosine", "arpg_cosine", "arccos"]


@dataclass(frozen=True)
class ModelConfig(command.Config):
    """Everything a method needs to be built; saved in every checkpoint."""

    vocab_size: command.Vocabulary = 1024
    """V, size of the codebook"""
    classes: Annotated[int, command.Range(1, 10**5)] = 10
    """labels are 0..classes-1; `classes` itself is the null label"""
    grid: Annotated[int, command.Range(1, 256)] = 8
    """side of the token grid"""
    layers: Annotated[int, command.Range(1, 256)] = 4
    heads: Annotated[int, command.Range(1, 256)] = 4
    width: Annotated[int, command.Range(1, 2**14)] = 128
    token_dropout: command.Fraction = 0.1
    residual_dropout: command.Fraction = 0.1
    ffn_dropout: command.Fraction = 0.1
    scan: str = "raster"
    """the one order of a method that cannot choose"""
    cells: tuple[int, ...] = ()
    """the cells in the order `scan`, if that is no function of the grid: read from a file, drawn"""
    regions: int = 4
    """of the order `regions`: PAR generates as many codes side by side, its n"""
    ffn_width: Annotated[int, command.Range(1, 2**16)] | None = None
    """RAR: hidden width of the feed-forward; None: 4 x width"""
    spare_rows: bool = False
    """RAR: position tables with the unused rows that its published files have"""

    def check(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(
                f"expected width / heads to be a multiple of 4, got {self.width} / {self.heads}"
            )

    @property
    def tokens(self) -> int:
        return self.grid * self.grid  # T

    @property
    def head_width(self) -> int:
        return self.width // self.heads  # K


DROPOUTS = ("token_dropout", "residual_dropout", "ffn_dropout")
SIZES = {
    "nano": {"layers": 4, "heads": 4, "width": 128},
    "small": {"layers": 6, "heads": 4, "width": 256},
    "base": {"layers": 8, "heads": 6, "width": 384},
    "large": {"layers": 12, "heads": 8, "width": 512},
}
"""The presets of --model: 1.3, 5.6, 15 and 42 million parameters at V = 1024."""


def groups_of(tokens: int, steps: int, grouping: Grouping) -> list[int]:
    """Return how many codes each step decodes: `steps` sizes >= 1, sum `tokens`.

    cosine is RandAR's schedule, few first; ARPG's are arpg_cosine, which grows too, and arccos,
    flat with a large last step. Raises InputError unless 1 <= steps <= tokens.
    """
    if not 1 <= steps <= tokens:
        raise InputError(f"expected decode steps in 1..{tokens}, got {steps}")
    done = [0]
    for step in range(1, steps):
        # the float64 order of operations is part of it: where the cosine hits tokens / 2, at
        # step / steps = 2/3, another gives other sizes
        cosine = math.cos((math.pi / 2) * step / steps)
        if grouping == "cosine":
            target = math.floor((1 - cosine) * tokens + 1) if step > 1 else 1
        elif grouping == "arpg_cosine":
            target = tokens - math.floor(tokens * cosine)
        else:
            target = tokens - math.floor(tokens * ((2 / math.pi) * math.acos(step / steps)))
        done.append(min(tokens - 1, max(done[-1] + 1, target)))
    return [after - before for before, after in itertools.pairwise([*done, tokens])]


class Cache:
    """What a method has been fed while it generates."""

    def rewind(self, codes: int) -> None:
        """Forget all but the first `codes` codes, and what was asked for after them.

        The next call commits codes, of any cells that the method can follow; after rewind(0) it may
        commit none.
        """
        raise NotImplementedError


class Method(nn.Module):
    """A way to predict the codes of a grid one after another, in some order."""

    any_order: bool
    """can be asked for any order (else only for `config.scan`)"""
    parallel: bool
    """can be asked for several cells at once"""
    scans: tuple[str, ...] = SCANS
    """the fixed orders it can be trained in; the first is the one when no order is asked for"""
    head_name: str = "output"
    """name of the linear map to logits"""
    no_decay: tuple[str, ...] = ()
    """parts of the names of tensors that get no weight decay, besides norms and biases"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @property
    def null_label(self) -> int:
        """The label that means "no label", for guidance."""
        return self.config.classes

    def order(self, name: str) -> torch.Tensor:
        """Return an order_T over this method's grid by name or path. Raises InputError as `scan`.

        The name of the order that it was trained in is that order, wherever its file is now.
        """
        config = self.config
        if name != config.scan:
            return scan(name, config.grid, config.regions)
        own_T = self.own_order()
        here = config.cells and Path(name).is_file()
        if here and not torch.equal(scan(name, config.grid), own_T):
            raise InputError(f"{name} is not the {name} that this was trained in: rename it")
        return own_T

    def own_order(self) -> torch.Tensor:
        """Return order_T of the scan that it was trained in; looks at no file of its name."""
        if self.config.cells:
            return torch.tensor(self.config.cells)
        return scan(self.config.scan, self.config.grid, self.config.regions)

    def check_order(self, order_BS: torch.Tensor) -> None:
        """Raise InputError unless the method can follow these orders.

        Waits for the device, so callers of `decode` ask it once before they start.
        """
        if self.any_order:
            return
        fixed_S = self.own_order().to(order_BS.device)
        if order_BS.shape[1:] != fixed_S.shape or not bool((order_BS == fixed_S).all()):
            scan, regions = self.config.scan, self.config.regions
            only = f"the order of its {regions} regions" if scan == "regions" else f"{scan} order"
            raise InputError(
                f"{type(self).__name__} generates in {only} only: nothing tells it which cell "
                "comes next"
            )

    def check_one(self, next_cells_Bn: torch.Tensor) -> None:
        """Raise ValueError unless one cell is asked for, by a `decode` that takes no more."""
        if (n := next_cells_Bn.shape[1]) != 1:
            raise ValueError(f"{type(self).__name__} decodes one cell at a time, asked for {n}")

    def groups(self, steps: int | None, grouping: Grouping = "cosine") -> list[int]:
        """Return how many codes each of `steps` calls of `decode` asks for.

        None is the method's own number: one call a code, unless a method says otherwise. Raises
        InputError for a number of steps that the method cannot take.
        """
        tokens = self.config.tokens
        if not self.parallel and steps not in (None, tokens):
            raise InputError(
                f"{type(self).__name__} decodes one code a step: expected --decode-steps {tokens}, "
                f"got {steps}"
            )
        return groups_of(tokens, tokens if steps is None else steps, grouping)

    def forward(
        self, codes_BT: torch.Tensor, label_B: torch.Tensor, order_BS: torch.Tensor
    ) -> torch.Tensor:
        """Teacher forcing: return logits_BSV, fp32 or wider.

        logits[:, s] is the distribution of the code at cell order[:, s], given the label and the
        codes at order[:, :s]. codes_BT int64 in [0, V), label_B int64 in [0, classes], order_BS a
        permutation of 0..T-1 in each row. Raises ValueError for an order it does not support.
        """
        raise NotImplementedError

    def loss(
        self, logits_BSV: torch.Tensor, codes_BT: torch.Tensor, order_BS: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (scalar to descend, {name: scalar to log}); here the mean cross-entropy, nats."""
        nats = F.cross_entropy(logits_BSV.flatten(0, 1), codes_BT.gather(1, order_BS).flatten())
        return nats, {"nats": nats.detach()}

    def cache(self, label_B: torch.Tensor) -> Cache:
        """Start generating: return the state that `decode` reads and writes."""
        raise NotImplementedError

    def decode(
        self,
        cache: Cache,
        codes_Bm: torch.Tensor,
        cells_Bm: torch.Tensor,
        next_cells_Bn: torch.Tensor,
    ) -> torch.Tensor:
        """Commit m >= 0 codes at cells_Bm, in that order; return logits_BnV of the n >= 1 cells.

        The cells committed are the first m of those that the last call asked for; to commit others,
        or to ask again, `cache.rewind` first. Asking for groups of one cell gives the logits of
        `forward`. Nothing in it waits for the device: that the cells are those of an order the
        method can follow, the caller has checked (`check_order`). Raises ValueError for n > 1
        without `parallel`.
        """
        raise NotImplementedError
