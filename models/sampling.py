"""From logits to images: guidance, picking, and the one decode loop.

Sampling, parallel decoding and filling in what is missing (editing, inpainting, ..) are one loop
over `Method.decode`: an order, group sizes, a guidance scale a step, and perhaps known codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from models import command
from models.command import InputError
from models.method import Grouping, Method, groups_of
from models.orders import CHOSEN, Choice, doubtful_last, known_first, sample_chance
from models.tokenizer import Tokenizer, decode_codes

Schedule = Literal["constant", "linear", "linear_after", "power_cosine"]
BLOCK = 2**16
"""logits picked from at once on a CPU, whose cache then holds what is made of them in float64"""


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
    most = max(1, BLOCK // math.prod(logits_BnV.shape[1:]))
    if logits_BnV.device.type == "cpu" and len(logits_BnV) > most:
        blocks = zip(logits_BnV.split(most), uniform_Bn.split(most), strict=True)
        return torch.cat([pick(*block, temperature, top_k, top_p) for block in blocks])
    logits_BnV = logits_BnV.double() / temperature
    if 0 < top_k < logits_BnV.shape[-1]:
        least_Bn1 = logits_BnV.topk(top_k).values[..., -1:]
        logits_BnV = logits_BnV.masked_fill(logits_BnV < least_Bn1, -math.inf)
    p_BnV = logits_BnV.softmax(-1)
    if top_p < 1:
        sorted_BnV, rank_BnV = p_BnV.sort(dim=-1, descending=True)
        kept_BnV = sorted_BnV * (sorted_BnV.cumsum(-1) - sorted_BnV < top_p)
        p_BnV = torch.zeros_like(p_BnV).scatter(-1, rank_BnV, kept_BnV)
    mass_BnV = p_BnV.cumsum(-1)
    # `right` skips codes of no mass; scaling keeps u under the last kept code's cumulated mass
    threshold_Bn1 = (uniform_Bn.double() * mass_BnV[..., -1]).unsqueeze(-1)
    codes_Bn = torch.searchsorted(mass_BnV, threshold_Bn1, right=True).squeeze(-1)
    return codes_Bn.clamp(max=logits_BnV.shape[-1] - 1)


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
    known_BS: torch.Tensor | None = None,
    watch: Callable[[torch.Tensor], None] | None = None,
    choice: Choice | None = None,
) -> torch.Tensor:
    """Generate codes_BT in raster positions, every cell written once.

    `sizes` and `scales` give each step's number of codes and guidance scale; guidance runs a second
    half-batch with the null label, in the steps whose scale is not 1. `known_BS` holds codes along
    each order that are written instead of sampled, -1 elsewhere; the first that `sizes` does not
    count are there from the start. `watch` is handed the codes after each step, -1 where there is
    none yet. A `choice` has every step ask for all open cells, and write those it puts first.
    Raises InputError for a plan that the grid or the method cannot follow.
    """
    batch, tokens = order_BS.shape
    known = tokens - sum(sizes)
    codes_Bq = order_BS[:, :0] if known_BS is None else known_BS[:, : max(0, known)]
    if codes_Bq.shape[1] != known or min(sizes) < 1 or (known and (codes_Bq < 0).any()):
        raise InputError(f"expected groups >= 1 with sum {tokens} or as known, got {list(sizes)}")
    if max(sizes) > 1 and not model.parallel:
        raise InputError(f"{type(model).__name__} decodes one code a step, got {len(sizes)} steps")
    model.check_order(order_BS)
    labels = torch.cat((label_B, torch.full_like(label_B, model.null_label)))
    fed, times = 0, 0
    for step, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        times_before, times = times, 1 if scale == 1 else 2
        if times != times_before:  # guidance starts or ends: all codes so far are fed anew
            cache, fed = model.cache(labels[: times * batch]), 0
        elif choice is not None:  # other cells are committed than the first that were asked for
            cache.rewind(fed)
        done = codes_Bq.shape[1]
        upto, uniform_Bn = done + size, uniform_BS[:, done : done + size]
        if choice is not None:
            upto, uniform_Bn = tokens, choice.uniform_BkT[:, step, : tokens - done]
        inputs = codes_Bq[:, fed:], order_BS[:, fed:done], order_BS[:, done:upto]
        logits = model.decode(cache, *(x.repeat(times, 1) for x in inputs))
        fed = done
        if scale != 1:
            logits = guide(*logits.chunk(2), scale)
        drawn_Bn = pick(logits, uniform_Bn, temperature, top_k, top_p)
        if choice is not None:
            first_Bn = choice(step, logits, drawn_Bn)
            order_BS = torch.cat((order_BS[:, :done], order_BS[:, done:].gather(1, first_Bn)), 1)
            drawn_Bn = drawn_Bn.gather(1, first_Bn[:, :size])
        if known_BS is not None:
            known_Bn = known_BS[:, done : done + size]
            drawn_Bn = torch.where(known_Bn < 0, drawn_Bn, known_Bn)
        codes_Bq = torch.cat((codes_Bq, drawn_Bn), dim=1)
        if watch is not None:
            watch(_in_place(codes_Bq, order_BS))
    return _in_place(codes_Bq, order_BS)


@torch.no_grad()
def log_p(model: Method, codes_BT, label_B, order_BS) -> torch.Tensor:
    """Return ln p of each code given those before it, (B, S) along the orders."""
    logits_BSV, target_BS = model(codes_BT, label_B, order_BS), codes_BT.gather(1, order_BS)
    return logits_BSV.log_softmax(-1).gather(2, target_BS.unsqueeze(2)).squeeze(2)


def _in_place(codes_Bq: torch.Tensor, order_BS: torch.Tensor) -> torch.Tensor:
    """Return codes_BT of the first q cells of each order, -1 in cells still to come."""
    return torch.full_like(order_BS, -1).scatter(1, order_BS[:, : codes_Bq.shape[1]], codes_Bq)


@dataclass(frozen=True)
class Plan(command.Config):
    """How to sample: everything but the model, the labels and the seed."""

    order: str = "raster"
    """a scan; `random`: an order of its own for each sample; or how the model chooses it"""
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
    top_p: Annotated[float, command.Range(1e-6, 1)] = 1.0
    choice_temperature: command.Amount = 8.0
    """of the noise in an order that the model chooses; 0: always the surest cells first"""
    revise: command.Fraction = 0.0
    """share of the cells that are drawn anew given all others: those least likely as they came"""
    rounds: Annotated[int, command.Range(1, 100)] = 1
    """of revising"""
    revise_scale: command.Amount | None = None
    """guidance scale of revising; None: that of sampling, but 2 at most"""

    def check(self) -> None:
        if self.cfg_from > self.cfg_to:
            raise InputError(f"expected --cfg-from up to --cfg-to {self.cfg_to}: {self.cfg_from}")
        if self.revise and self.order in CHOSEN:
            raise InputError(f"--revise asks what came before, and --order {self.order} is chosen")

    def groups(self, model: Method, known: int = 0) -> tuple[list[int], list[float]]:
        """Return each step's number of codes and its guidance scale, for this method.

        With `known` codes there beforehand, guidance begins where their number stands.
        """
        sizes, tokens = model.groups(self.decode_steps, self.grouping), model.config.tokens
        if known:
            sizes = groups_of(tokens - known, min(tokens - known, len(sizes)), self.grouping)
        how, scales, done = (self.schedule, self.cfg_scale, self.power), [], known
        for size in sizes:
            guided = self.cfg_from <= done / tokens < self.cfg_to
            scales.append(guidance_at(*how, done, size, tokens) if guided else 1.0)
            done += size
        return sizes, scales

    def calls(self, model: Method) -> int:
        """Return the network calls of a sample; a round of revising takes one to find its cells."""
        calls, tokens = len(self.groups(model)[0]), model.config.tokens
        if cells := round(self.revise * tokens):
            calls += self.rounds * (1 + len(self.groups(model, tokens - cells)[0]))
        return calls


def sample_codes(
    model: Method, label_N: torch.Tensor, plan: Plan, seed: int, first: int = 0
) -> torch.Tensor:
    """Return codes_NT, int64 on the model's device, of samples first..first+N of the stream `seed`.

    One batch; the caller splits. A sample is the same whatever batch it is in.
    """
    label_M = label_N.repeat(2) if len(label_N) == 1 else label_N  # a lone row is rounded otherwise
    nothing_MT = torch.zeros(len(label_M), model.config.tokens, dtype=torch.int64)
    return fill(model, nothing_MT, nothing_MT[0] == 0, label_M, plan, seed, first)[: len(label_N)]


def fill(
    model: Method,
    codes_NT: torch.Tensor,
    open_T: torch.Tensor,
    label_N: torch.Tensor,
    plan: Plan,
    seed: int,
    first: int = 0,
    watch: Callable[[torch.Tensor], None] | None = None,
    past: bool = False,
) -> torch.Tensor:
    """Return codes_NT with the open cells, bool (T,), drawn anew given all others and the label.

    The others are committed first, all at once, in the plan's order, then the open ones follow in
    it; with `plan.revise`, those of them that are least likely given what came before are then
    drawn again given all others. With every cell open it is `sample_codes`, with none the codes as
    they are. Raises InputError for a method that is not told which cell comes next; with `past`
    such a one can do it too: every cell has its turn, and an open one is drawn given those before
    it only.
    """
    config, device = model.config, next(model.parameters()).device
    samples = range(first, first + len(label_N))
    uniform_BS, order_BS = sample_chance(seed, samples, config.tokens)
    if plan.order not in ("random", *CHOSEN):
        order_BS = model.order(plan.order).expand_as(order_BS)
    opened = int(open_T.sum())
    known, cells = config.tokens - opened, min(opened, round(plan.revise * config.tokens))
    if not model.any_order and ((known and not past) or cells):
        raise InputError(
            f"{type(model).__name__} generates in {config.scan} order only: it cannot be given the "
            "cells to keep; take a checkpoint of a method with any order"
        )
    if past and plan.order in CHOSEN:
        raise InputError(f"expected an order that gives every cell its turn, got {plan.order}")
    order_BS = order_BS if past else known_first(order_BS, open_T)
    if not opened:
        return codes_NT.to(device)
    sizes, scales = plan.groups(model, 0 if past else known)
    choice = None
    if plan.order in CHOSEN:
        chance = seed, samples, (len(sizes), config.tokens), device
        choice = Choice.of(plan.order, plan.choice_temperature, *chance)
    moved = (x.to(device) for x in (codes_NT, label_N, order_BS, open_T))
    codes_NT, label_N, order_BS, open_T = moved
    known_BS = codes_NT.masked_fill(open_T, -1).gather(1, order_BS) if known else None
    how = plan.temperature, plan.top_k, plan.top_p
    start = label_N, order_BS, uniform_BS.to(device), sizes, scales
    codes_NT = generate(model, *start, *how, known_BS, watch, choice)
    again = min(2.0, plan.cfg_scale) if plan.revise_scale is None else plan.revise_scale
    for turn in range(plan.rounds if cells else 0):
        order_BS = doubtful_last(order_BS, log_p(model, codes_NT, label_N, order_BS), open_T, cells)
        known_BS = codes_NT.gather(1, order_BS)
        known_BS[:, -cells:] = -1
        uniform_BS, _ = sample_chance(seed, samples, config.tokens, 3, turn)
        sizes, _ = plan.groups(model, config.tokens - cells)
        start = label_N, order_BS, uniform_BS.to(device), sizes, [again] * len(sizes)
        codes_NT = generate(model, *start, *how, known_BS, watch)
    return codes_NT


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
