"""From logits to images: guidance, picking, and the one decode loop.

Sampling, parallel decoding, and filling in what is missing (inpainting, editing, outpainting) are
the same loop over `Method.decode`: an order, group sizes, a guidance scale a step, and optionally
codes that are already known, which are committed first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from models import command
from models.command import InputError
from models.method import Method
from models.orders import Grouping, groups_of
from models.tokenizer import Tokenizer, decode_codes

Schedule = Literal["constant", "linear", "linear_after", "power_cosine"]


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Return classifier-free guidance, u + scale * (c - u) (Ho & Salimans, arXiv 2207.12598)."""
    return uncond + scale * (cond - uncond)


def guidance_at(
    schedule: Schedule, scale: float, power: float, done: int, size: int, total: int
) -> float:
    """Return the guidance scale of a step that decodes `size` codes after `done` of `total`.

    constant: `scale`. linear: 1 -> scale, as RandAR. linear_after: as ARPG, which counts the codes
    of the step too. power_cosine: RAR's 1 + (scale - 1) * (1 - cos(pi * (done/total)^power)) / 2;
    power 0 is constant.
    """
    if schedule == "constant":
        return scale
    if schedule.startswith("linear"):
        return 1 + (scale - 1) * (done + size * (schedule == "linear_after")) / total
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (done / total) ** power)) / 2


def pick(
    logits_BnV: torch.Tensor,
    uniform_Bn: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Draw codes_Bn, int64, from logits by inverting the CDF at `uniform_Bn` in [0, 1).

    temperature 0 takes the largest logit. top_k > 0 keeps the k largest (and ties with the k-th).
    top_p < 1 keeps the fewest most likely codes whose mass reaches p. The input is unchanged.
    """
    if temperature == 0:
        return logits_BnV.argmax(-1)
    logits_BnV = logits_BnV.double() / temperature
    if 0 < top_k < logits_BnV.shape[-1]:
        least_Bn1 = logits_BnV.topk(top_k).values[..., -1:]
        logits_BnV = logits_BnV.masked_fill(logits_BnV < least_Bn1, -math.inf)
    p_BnV = logits_BnV.softmax(-1)
    if top_p < 1:
        sorted_BnV, rank_BnV = p_BnV.sort(dim=-1, descending=True)
        before_BnV = sorted_BnV.cumsum(-1) - sorted_BnV
        drop_BnV = torch.zeros_like(p_BnV, dtype=torch.bool)
        drop_BnV.scatter_(-1, rank_BnV, before_BnV >= top_p)
        p_BnV = p_BnV.masked_fill(drop_BnV, 0)
    mass_BnV = p_BnV.cumsum(-1)
    # `right` skips codes of no mass; scaling keeps u under the last kept code's cumulated mass
    threshold_Bn1 = (uniform_Bn.double() * mass_BnV[..., -1]).unsqueeze(-1)
    codes_Bn = torch.searchsorted(mass_BnV, threshold_Bn1, right=True).squeeze(-1)
    return codes_Bn.clamp(max=logits_BnV.shape[-1] - 1)


def sample_chance(seed: int, samples: range, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (uniform_BS in [0, 1) float64, random order_BS int64), each sample its own stream.

    Row i depends on (seed, samples[i]) only: an image does not depend on the batch it is in.
    """
    streams = [np.random.default_rng([seed, sample]) for sample in samples]
    uniform_BS = np.stack([stream.random(tokens) for stream in streams])
    order_BS = np.stack([stream.permutation(tokens) for stream in streams])
    return torch.from_numpy(uniform_BS), torch.from_numpy(order_BS)


@torch.no_grad()
def generate(
    model: Method,
    label_B: torch.Tensor,
    order_BS: torch.Tensor,
    uniform_BS: torch.Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    known_Bm: torch.Tensor | None = None,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Generate codes_BT in raster positions, every cell written once.

    `sizes` and `scales` give each step's number of codes and guidance scale; guidance runs a second
    half-batch with the null label, in the steps whose scale is not 1. With `known_Bm`, the first m
    cells of each order hold these codes and are not sampled. `watch` is handed the codes after each
    step, -1 where there is none yet. Raises InputError for a plan that does not fill the grid or
    that the method cannot follow.
    """
    tokens = order_BS.shape[1]
    known_Bm = order_BS[:, :0] if known_Bm is None else known_Bm
    left = tokens - known_Bm.shape[1]
    if sum(sizes) != left or min(sizes) < 1:
        raise InputError(f"expected groups >= 1 with sum {left}, got {list(sizes)}")
    if max(sizes) > 1 and not model.parallel:
        name = type(model).__name__
        raise InputError(f"{name} decodes one code a step: expected {left} steps, got {len(sizes)}")
    model.check_order(order_BS)
    batch, null_B = len(label_B), torch.full_like(label_B, model.null_label)
    labels = torch.cat((label_B, null_B))
    cells = torch.cat((order_BS, order_BS)).split([known_Bm.shape[1], *sizes], dim=1)
    uniforms = uniform_BS.split([known_Bm.shape[1], *sizes], dim=1)
    groups, rows = [known_Bm], 0
    for step, scale in enumerate(scales):
        committed, rows_before = slice(step, step + 1), rows
        rows = batch if scale == 1 else 2 * batch
        if rows != rows_before:  # guidance starts or ends: all codes so far are fed anew
            cache, committed = model.cache(labels[:rows]), slice(step + 1)
        codes_Bm = torch.cat(groups[committed], dim=1).repeat(rows // batch, 1)
        cells_Bm = torch.cat(cells[committed], dim=1)[:rows]
        logits = model.decode(cache, codes_Bm, cells_Bm, cells[step + 1][:rows])
        if scale != 1:
            logits = guide(*logits.chunk(2), scale)
        groups.append(pick(logits, uniforms[step + 1], temperature, top_k, top_p))
        if watch is not None:
            watch(_in_place(groups, order_BS))
    return _in_place(groups, order_BS)


def _in_place(groups: Sequence[torch.Tensor], order_BS: torch.Tensor) -> torch.Tensor:
    """Return codes_BT of the groups picked so far, -1 in cells still to come."""
    codes_Bq = torch.cat(list(groups), dim=1)
    return torch.full_like(order_BS, -1).scatter(1, order_BS[:, : codes_Bq.shape[1]], codes_Bq)


@dataclass(frozen=True)
class Plan(command.Config):
    """How to sample: everything but the model, the labels and the seed."""

    order: str = "raster"
    """a scan, or `random`: an order of its own for each sample"""
    decode_steps: command.Count | None = None
    """network calls; fewer than tokens decode several codes at once; None: the method's own"""
    grouping: Grouping = "cosine"
    """how many codes each step decodes, when several"""
    cfg_scale: command.Amount = 1.0
    """guidance scale, 1 for none"""
    schedule: Schedule = "linear"
    power: command.Amount = 2.75
    """of power_cosine"""
    cfg_from: command.Fraction = 0.0
    """share of the codes that are decoded before guidance begins"""
    cfg_to: command.Share = 1.0
    """share of the codes after which it ends; LlamaGen's cfg_interval i is (i + 2) / tokens"""
    temperature: command.Amount = 1.0
    top_k: command.Natural = 0
    top_p: command.Share = 1.0

    def groups(self, model: Method, known: int = 0) -> tuple[list[int], list[float]]:
        """Return each step's number of codes and its guidance scale, for this method.

        With `known` codes there beforehand, guidance begins where their number stands.
        """
        sizes, tokens = model.groups(self.decode_steps, self.grouping), model.config.tokens
        if known:
            left = tokens - known
            sizes = groups_of(left, min(left, len(sizes)), self.grouping) if left else []
        how, scales, done = (self.schedule, self.cfg_scale, self.power), [], known
        for size in sizes:
            guided = self.cfg_from <= done / tokens < self.cfg_to
            scales.append(guidance_at(*how, done, size, tokens) if guided else 1.0)
            done += size
        return sizes, scales


def sample_codes(
    model: Method, label_N: torch.Tensor, plan: Plan, seed: int, first: int = 0
) -> torch.Tensor:
    """Return codes_NT, int64 on the model's device, of samples first..first+N of the stream `seed`.

    One batch; the caller splits. A sample is the same whatever batch it is in.
    """
    tokens = model.config.tokens
    nothing_NT = torch.zeros(len(label_N), tokens, dtype=torch.int64)
    return fill(model, nothing_NT, torch.ones(tokens, dtype=torch.bool), label_N, plan, seed, first)


def fill(
    model: Method,
    codes_NT: torch.Tensor,
    open_T: torch.Tensor,
    label_N: torch.Tensor,
    plan: Plan,
    seed: int,
    first: int = 0,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Return codes_NT with the open cells, bool (T,), drawn anew given all others and the label.

    The others are committed first, all at once, in the plan's order, then the open ones follow in
    it. With every cell open it is `sample_codes`, with none the codes as they are. Raises
    InputError for a method that is not told which cell comes next.
    """
    config, device = model.config, next(model.parameters()).device
    uniform_BS, order_BS = sample_chance(seed, range(first, first + len(label_N)), config.tokens)
    if plan.order != "random":
        order_BS = model.order(plan.order).expand_as(order_BS)
    known = config.tokens - int(open_T.sum())
    if known and not model.any_order:
        raise InputError(
            f"{type(model).__name__} generates in {config.scan} order only: it cannot be given the "
            "cells to keep; take a checkpoint of a method with any order"
        )
    order_BS = order_BS.gather(1, open_T[order_BS].int().argsort(dim=1, stable=True)).to(device)
    if known == config.tokens:
        return codes_NT.to(device)
    return generate(
        model,
        label_N.to(device),
        order_BS,
        uniform_BS.to(device),
        *plan.groups(model, known),
        plan.temperature,
        plan.top_k,
        plan.top_p,
        codes_NT.to(device).gather(1, order_BS[:, :known]),
        watch,
    )


@dataclass(frozen=True)
class ImageSampler:
    """A method and the tokenizer of its codes: from labels to pixels."""

    model: Method
    tokenizer: Tokenizer

    def __call__(self, label_B: torch.Tensor, plan: Plan, seed: int, first: int) -> np.ndarray:
        """Return uint8 (B, H, W, 3) of samples first..first+B of the stream `seed`."""
        return decode_codes(self.tokenizer, sample_codes(self.model, label_B, plan, seed, first))

    def to(self, device: torch.device | str) -> "ImageSampler":
        return ImageSampler(self.model.to(device), self.tokenizer.to(device))
