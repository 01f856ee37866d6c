"""PAR: one fixed order over regions, one code of each region at a time.

Paper: Wang et al., "Parallelized Autoregressive Visual Generation", arXiv 2412.15119. Code:
github.com/YuqingWang1029/PAR.

The grid is cut into n square regions and visited as `orders.region_scan` says: the same cell of
every region before the next cell of any. The first n codes, x_1 .. x_n, are generated one by one,
then n at once. The sequence, its slots in blocks of n, and what each block predicts:

    c x_1 .. x_{n-1}  |  x_n s_1 .. s_{n-1}  |  x_{n+1} .. x_{2n}    |  ..
    x_1 .. x_n        |  x_{n+1} .. x_{2n}   |  x_{2n+1} .. x_{3n}   |  ..

so that slot i predicts the code of step i (0-based). s_1 .. s_{n-1} are learned special tokens
that fill the place of codes that are not there. The first block is causal; the slots of a later one
see all of it and all before it, so the codes of a group are independent given the groups before.
Each code carries the RoPE of its own cell; c and the specials have the zero row, so everything
they see, and everything that sees them, does so with logit 0.

Differs from it in: the wasted last n - 1 inputs are not fed, so the sequence has T slots instead
of T + n - 1, with the same logits; the null label is put in by the training script, not in here;
fp32 logits in every mode; no stochastic depth; groups can also be decoded code by code.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.command import InputError
from models.method import Method
from models.orders import region_scan
from models.transformer import (
    Block,
    ClassEmbedding,
    LayerCache,
    ModelConfig,
    RMSNorm,
    initialise,
    rotation_at,
    run_blocks,
    widened,
)


def group_ends(tokens: int, regions: int, device: torch.device | None = None) -> torch.Tensor:
    """Return end_S: slot s sees slots 0..end[s], and is fed together with those up to there."""
    slot_S = torch.arange(tokens, device=device)
    return torch.where(slot_S < regions, slot_S + 1, (slot_S // regions + 1) * regions)


@functools.lru_cache(maxsize=32)
def slot_cells(grid: int, regions: int, device: torch.device) -> torch.Tensor:
    """Return cell_L of the slots, -1 for the class token and the specials."""
    cell_S = region_scan(grid, regions)
    none_n = cell_S.new_full((regions,), -1)
    cell_L = torch.cat((none_n[:1], cell_S[:regions], none_n[1:], cell_S[regions:]))
    return cell_L.to(device)


@functools.lru_cache(maxsize=32)
def group_mask(tokens: int, regions: int, device: torch.device | None = None) -> torch.Tensor:
    """Return seen_SL, bool (T, T): the first block of `regions` causal, later ones whole."""
    return torch.arange(tokens, device=device) < group_ends(tokens, regions, device).unsqueeze(1)


class SpecialTokens(nn.Module):
    """The n - 1 learned vectors in the place of codes before the first parallel group."""

    def __init__(self, regions: int, width: int):
        """Build the table (n - 1, width)."""
        super().__init__()
        self.special_embeddings = nn.Embedding(regions - 1, width)

    def forward(self, batch: int) -> torch.Tensor:
        """Return all of them for each of `batch` images, (B, n - 1, D)."""
        return self.special_embeddings.weight.expand(batch, -1, -1)


@dataclass
class PARCache:
    """What has been committed and fed, and the last group's logits."""

    label_B: torch.Tensor
    codes_BS: torch.Tensor
    """committed, in order; those of the last group may not be fed yet"""
    layers: list[LayerCache]
    fed: int = 0
    """slots in the caches of the layers"""
    logits_BnV: torch.Tensor | None = None
    """of the group that ends at step `fed`: asked for at once or not, it is computed once"""


class PAR(Method):
    """PAR: the next cells are told by nothing, the order being fixed; n are asked for at once."""

    any_order = False
    parallel = True
    scans = ("regions",)

    def __init__(self, config: ModelConfig):
        """Build the network; the output head starts at zero, so the first loss is ln V.

        Whatever config.scan says, the order is that of config.regions. Raises InputError for fewer
        than four regions (there would be nothing to do side by side, or no square of two).
        """
        super().__init__(replace(config, scan=self.scans[0]))
        if config.regions < 4:
            raise InputError(
                f"expected regions of PAR: 4, 16 or another square of a divisor of {config.grid}, "
                f"got {config.regions}"
            )
        self.order("regions")  # refuses other numbers
        self.cls_embedding = ClassEmbedding(config.classes, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.spe_tok_embeddings = SpecialTokens(config.regions, config.width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self)
        nn.init.zeros_(self.output.weight)

    def groups(self, steps, grouping="cosine"):
        """Return n groups of one, then groups of n; with `steps` = T, groups of one only."""
        tokens, regions = self.config.tokens, self.config.regions
        own = [1] * regions + [regions] * (tokens // regions - 1)
        if steps in (None, len(own)):
            return own
        if steps == tokens:
            return [1] * tokens
        raise InputError(
            f"PAR of {regions} regions decodes in {len(own)} steps, or in {tokens} of one code: "
            f"got --decode-steps {steps}"
        )

    def _run(
        self,
        label_B: torch.Tensor,
        codes_BS: torch.Tensor,
        start: int,
        stop: int,
        layers: list[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Feed slots start..stop of the sequence, the codes being known so far; return logits."""
        tokens, regions = self.config.tokens, self.config.regions
        inputs_BLD = (
            self.cls_embedding(label_B),
            self.tok_embeddings(codes_BS[:, :regions]),
            self.spe_tok_embeddings(len(label_B)),
            self.tok_embeddings(codes_BS[:, regions:]),
        )
        cell_L = slot_cells(self.config.grid, regions, label_B.device)
        rotation_1LR = rotation_at(self.config, cell_L[None, start:stop])
        seen_LL = group_mask(tokens, regions, label_B.device)[start:stop, :stop]
        x_BLD = self.token_dropout(torch.cat(inputs_BLD, dim=1)[:, start:stop])
        x_BLD = run_blocks(self.layers, x_BLD, rotation_1LR, layers, start, seen_LL)
        return widened(self.output(self.norm(x_BLD)))

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV; see Method. Raises ValueError unless every row is the region order."""
        self.check_order(order_BS)
        return self._run(label_B, codes_BT.gather(1, order_BS), 0, self.config.tokens)

    def cache(self, label_B):
        """Return an empty PARCache."""
        layers = [LayerCache(self.config.tokens) for _ in self.layers]
        return PARCache(label_B, label_B.new_empty(len(label_B), 0), layers)

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return logits_BnV; see Method.

        A group is fed and computed whole when the first of its cells is asked for, and the others
        are served from there: T groups of one take T / n + n - 1 runs of the network too. Raises
        ValueError for cells of two groups, the codes of the first being needed for the second.
        """
        committed = cache.codes_BS.shape[1]
        first = committed + codes_Bm.shape[1]
        last = first + next_cells_Bn.shape[1]
        regions = self.config.regions
        end = first + 1 if first < regions else (first // regions + 1) * regions
        if last > end:
            raise ValueError(
                f"PAR of {self.config.regions} regions decodes at most {end - first} cells at once "
                f"after {first} codes, asked for {last - first}"
            )
        cache.codes_BS = torch.cat((cache.codes_BS, codes_Bm), dim=1)
        if cache.fed < end:
            group = 1 if end <= self.config.regions else self.config.regions
            logits_BLV = self._run(cache.label_B, cache.codes_BS, cache.fed, end, cache.layers)
            cache.logits_BnV, cache.fed = logits_BLV[:, -group:], end
        behind = cache.fed - cache.logits_BnV.shape[1]
        return cache.logits_BnV[:, first - behind : last - behind]
