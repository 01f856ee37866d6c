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

Differs from it in what `method.py` says (the sequence has T slots, not T + n - 1), and in: groups
can also be decoded code by code.
"""

import functools
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.command import InputError
from models.gpt import Llama, LlamaCache
from models.method import ModelConfig
from models.orders import region_scan
from models.transformer import LayerCache


@functools.lru_cache(maxsize=32)
def layout(grid: int, regions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cell_L of the slots, -1 for the class token and the specials, and what each sees.

    That is seen_LL, bool (T, T): the first block of `regions` is causal, later ones are whole.
    """
    cell_S = region_scan(grid, regions)
    none_n = cell_S.new_full((regions,), -1)
    cell_L = torch.cat((none_n[:1], cell_S[:regions], none_n[1:], cell_S[regions:]))
    slot_L = torch.arange(grid * grid)
    end_L = torch.where(slot_L < regions, slot_L + 1, (slot_L // regions + 1) * regions)
    return cell_L.to(device), (slot_L < end_L.unsqueeze(1)).to(device)


@dataclass
class PARCache(LlamaCache):
    """What has been committed and fed, and the last group's logits."""

    codes_BS: torch.Tensor | None = None
    """committed, in order; those of the last group may not be fed yet"""
    regions: int = 4
    logits_BnV: torch.Tensor | None = None
    """of the group that ends at step `fed`: asked for at once or not, it is computed once"""

    def group(self, codes: int) -> tuple[int, int]:
        """Return the steps start..end of the group of the code that follows so many."""
        start = codes if codes < self.regions else codes // self.regions * self.regions
        return start, start + (1 if codes < self.regions else self.regions)

    def rewind(self, codes: int) -> None:
        start, end = self.group(codes)
        self.codes_BS = self.codes_BS[:, :codes]
        self.fed = self.fed if self.fed <= end else start


class PAR(Llama):
    """PAR: the next cells are told by nothing, the order being fixed; n are asked for at once."""

    any_order = False
    parallel = True
    scans = ("regions",)

    def __init__(self, config: ModelConfig):
        """Whatever config.scan says, the order is that of config.regions.

        Raises InputError for fewer than four regions (there would be nothing to do side by side, or
        no square of two).
        """
        super().__init__(replace(config, scan=self.scans[0]))
        if config.regions < 4:
            raise InputError(
                f"expected regions of PAR: 4, 16 or another square of a divisor of {config.grid}, "
                f"got {config.regions}"
            )
        self.order("regions")  # refuses other numbers
        specials = nn.Embedding(config.regions - 1, config.width)
        nn.init.normal_(specials.weight, std=0.02)
        self.spe_tok_embeddings = nn.Sequential(OrderedDict(special_embeddings=specials))

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

    def _run(self, label_B, codes_BS, start, stop, layers=None) -> torch.Tensor:
        """Feed slots start..stop of the sequence, the codes being known so far; return logits."""
        regions = self.config.regions
        inputs_BLD = (
            self.cls_embedding(label_B[:, None]),
            self.tok_embeddings(codes_BS[:, :regions]),
            self.spe_tok_embeddings.special_embeddings.weight.expand(len(label_B), -1, -1),
            self.tok_embeddings(codes_BS[:, regions:]),
        )
        x_BLD = self.token_dropout(torch.cat(inputs_BLD, dim=1)[:, start:stop])
        cell_L, seen_LL = layout(self.config.grid, regions, label_B.device)
        cells_1L, seen_LL = cell_L[None, start:stop], seen_LL[start:stop, :stop]
        return self.logits(x_BLD, cells_1L, layers=layers, start=start, seen_LL=seen_LL)

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV; see Method. Raises ValueError unless every row is the region order."""
        self.check_order(order_BS)
        return self._run(label_B, codes_BT.gather(1, order_BS), 0, self.config.tokens)

    def cache(self, label_B):
        layers = [LayerCache(self.config.tokens) for _ in self.layers]
        none_B0 = label_B.new_empty(len(label_B), 0)
        return PARCache(label_B, layers, codes_BS=none_B0, regions=self.config.regions)

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return logits_BnV; see Method.

        A group is fed and computed whole when the first of its cells is asked for, and the others
        are served from there: T groups of one take T / n + n - 1 runs of the network too. Raises
        ValueError for cells of two groups, the codes of the first being needed for the second.
        """
        committed = cache.codes_BS.shape[1]
        first = committed + codes_Bm.shape[1]
        last = first + next_cells_Bn.shape[1]
        start, end = cache.group(first)
        if last > end:
            raise ValueError(
                f"PAR of {self.config.regions} regions decodes at most {end - first} cells at once "
                f"after {first} codes, asked for {last - first}"
            )
        cache.codes_BS = torch.cat((cache.codes_BS, codes_Bm), dim=1)
        if cache.fed < end:
            logits_BLV = self._run(cache.label_B, cache.codes_BS, cache.fed, end, cache.layers)
            cache.logits_BnV, cache.fed = logits_BLV[:, start - end :], end
        return cache.logits_BnV[:, first - start : last - start]
