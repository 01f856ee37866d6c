"""How a generator bears what is wrong: corrupted images, a wrong context, samples it misreads.

While sampling a method reads its own mistakes, in training it never does (exposure bias: Ranzato et
al., "Sequence Level Training with Recurrent Neural Networks", arXiv 1511.06732). Context: a share
rho of the codes is replaced and every step still has to predict its clean code, so NLL and ECE show
what wrong codes cost, and whether the method notices that it knows less. Sampling: the method
misreads a share rho of what it wrote, and the samples show what comes of it.

Images: corrupted as in `metrics/corruptions.py`, encoded to the nearest codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from metrics.calibration import LN2, Predictions, collect, ece, equal_width_edges, mean_of, trust
from metrics.evaluation import sampled_codes
from metrics.fidelity import psnr
from metrics.likelihood import logit_batches
from metrics.sample_calibration import class_log_p
from models.data import swap_codes
from models.method import Method
from models.sampling import Plan
from models.tokenizer import Tokenizer, decode_codes, encode_images

RHOS = (0.0, 0.05, 0.1, 0.2, 0.4)


def context_report(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    rhos: Sequence[float] = RHOS,
    neighbours_VK: torch.Tensor | None = None,
    batch: int = 100,
    seed: int = 0,
) -> list[dict]:
    """Return for each rho how well the clean codes are predicted; the first rho is 0.

    `more_bits_per_image` is paired with the clean context of the same image. One forward is enough:
    the contract is causal, so a step never reads the code in its own cell.
    """
    clean_N, rows = None, []
    others = model.config.vocab_size if neighbours_VK is None else neighbours_VK
    for rho in rhos:
        generator = torch.Generator().manual_seed(seed)  # a larger rho replaces these and others
        corrupted_NT = swap_codes(codes_NT, rho, others, generator)
        inputs = (corrupted_NT, label_N, order_NS, batch, f"rho {rho:g}", codes_NT)
        bits_NS = (tokens := collect(logit_batches(model, *inputs))).nats_NS / LN2
        clean_N = bits_NS.sum(1) if clean_N is None else clean_N
        row = {
            "rho": rho,
            "replaced": (corrupted_NT != codes_NT).double().mean().item(),
            "bits_per_image": mean_of(bits_NS.sum(1), seed),
            "more_bits_per_image": mean_of(bits_NS.sum(1) - clean_N, seed, keep=True),
            "bits_per_step": mean_of(bits_NS, seed),
            "accuracy": mean_of(tokens.correct_NS.mean(1), seed),
        }
        rows.append(row | trust(tokens, seed))
    return rows


class MisreadContext(Method):
    """A method that takes a code it is given for another with probability `rho`, when it samples.

    Made for one batch of samples. Which codes it misreads, and as what, depends on (seed, sample,
    cell) alone: not on the batch, the order, the grouping, or on guidance, whose two halves misread
    alike. What a small rho misreads is among what a larger one does. `forward` reads what it gets.
    """

    def __init__(self, model: Method, rho: float, seed: int, samples: range):
        super().__init__(model.config)
        self.model, self.rho = model, rho
        self.any_order, self.parallel, self.scans = model.any_order, model.parallel, model.scans
        self.order, self.groups, self.cache = model.order, model.groups, model.cache
        device = next(model.parameters()).device
        # the 1 makes it another stream than the one that `sample_chance` picks the codes by
        streams = [np.random.default_rng([seed, sample, 1]) for sample in samples]
        tokens, codes = model.config.tokens, model.config.vocab_size
        chance_BT = np.stack([stream.random(tokens) for stream in streams])
        step_BT = np.stack([stream.integers(1, codes, tokens) for stream in streams])
        self.chance_BT = torch.from_numpy(chance_BT).to(device)
        self.step_BT = torch.from_numpy(step_BT).to(device)

    def forward(self, codes_BT, label_B, order_BS):
        return self.model(codes_BT, label_B, order_BS)

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return the logits after the codes as misread; the batch is the samples once, or twice."""
        halves = len(codes_Bm) // len(self.chance_BT)
        chance_BT, step_BT = (x.repeat(halves, 1) for x in (self.chance_BT, self.step_BT))
        other_Bm = (codes_Bm + step_BT.gather(1, cells_Bm)) % self.config.vocab_size
        misread_Bm = chance_BT.gather(1, cells_Bm) < self.rho
        read_Bm = torch.where(misread_Bm, other_Bm, codes_Bm)
        return self.model.decode(cache, read_Bm, cells_Bm, next_cells_Bn)


def misread_samples(
    model: Method, label_N: torch.Tensor, plan: Plan, rho: float, seed: int, batch: int
) -> torch.Tensor:
    """Return codes_NT on the CPU, as written, of samples whose own codes were misread."""
    return sampled_codes(
        model, label_N, plan, seed, batch, partial(MisreadContext, model, rho, seed)
    )


@dataclass(frozen=True)
class Reading:
    """What a generator makes of N images, each in A versions."""

    tokens: Predictions
    """(N, A, S): its codes, under its label"""
    classes: Predictions
    """(N, A, 1): its class, by Bayes"""
    decibels_NA: torch.Tensor
    """PSNR of what its codes decode to, against the clean image"""
    decoded_NAHWC: np.ndarray
    """uint8, what its codes decode to"""

    def row(self, versions: slice = slice(None), seed: int = 0, keep: bool = False) -> dict:
        """Return the measures over these versions; an image counts once, as their mean.

        Resampling draws images, each with all of its versions.
        """
        tokens, classes = (  # (N, A, S) -> (N, A * S): the versions of an image side by side
            Predictions(*(value_NAS[:, versions].flatten(1) for value_NAS in x))
            for x in (self.tokens, self.classes)
        )
        decibels_NA = self.decibels_NA[:, versions]
        bits_N = tokens.nats_NS.sum(1) / LN2 / decibels_NA.shape[1]
        return {
            "bits_per_image": mean_of(bits_N, seed, keep),
            **trust(tokens, seed),
            "class_accuracy": mean_of(classes.correct_NS.mean(1), seed, keep),
            "class_ece": ece(classes, equal_width_edges(), seed),
            "psnr": mean_of(decibels_NA.mean(1), seed),
        }


def read_images(
    model: Method,
    tokenizer: Tokenizer,
    images_NAHWC: np.ndarray,
    clean_NHWC: np.ndarray,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 100,
    name: str | None = None,
) -> Reading:
    """Encode A versions of N images, all in their image's order, and see what the model says."""
    shape = images_NAHWC.shape[:2]
    codes_MT = encode_images(tokenizer, images_NAHWC.reshape(-1, *clean_NHWC.shape[1:]))
    label_M = label_N.repeat_interleave(shape[1])
    order_MS = order_NS.repeat_interleave(shape[1], dim=0)
    tokens = collect(logit_batches(model, codes_MT, label_M, order_MS, batch, name))
    log_p_MC = class_log_p(model, codes_MT, order_MS, batch)
    classes = collect([(log_p_MC.unsqueeze(1), label_M.unsqueeze(1))])
    decoded_MHWC = decode_codes(tokenizer, codes_MT)
    decibels_M = torch.from_numpy(psnr(decoded_MHWC, clean_NHWC.repeat(shape[1], axis=0)))
    by_image = (
        Predictions(*(value_MS.unflatten(0, shape) for value_MS in x)) for x in (tokens, classes)
    )
    return Reading(*by_image, decibels_M.view(shape), decoded_MHWC.reshape(images_NAHWC.shape))
