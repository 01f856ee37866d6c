"""What training scripts share: chance and orders by step, learning rate, devices, checks, log."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from models import command, orders
from models.artifacts import write_text
from models.command import InputError
from models.machine import bf16_is_native, flops_of
from models.method import Method
from models.orders import ScanName

OptimizerName = Literal["adamw", "muon"]
LoggerName = Literal["none", "tensorboard", "wandb"]
LOG_EVERY = 50
"""steps between the rows of a generator's log"""


def seed_step(seed: int, step: int, device: torch.device, rank: int = 0) -> torch.Generator:
    """Make all chance in a step a function of (seed, step, rank): a resume needs no RNG state.

    Seeds torch's global generator (dropout, codebook revival) and returns another for the rest.
    """
    a, b = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint64).tolist()
    torch.manual_seed(a)
    return torch.Generator(device).manual_seed(b)


def batch_rows(rows: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Return the row numbers of a step's batch, int64 (batch,): every epoch visits each row once.

    Epoch e is a permutation that depends on (seed, e) only; a batch may straddle two epochs.
    """
    wanted = torch.arange(step * batch, (step + 1) * batch)
    parts = []
    for epoch in wanted.div(rows, rounding_mode="floor").unique().tolist():
        (state,) = np.random.SeedSequence([seed, epoch, rows]).generate_state(1, np.uint64).tolist()
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(state))
        parts.append(order[wanted[wanted // rows == epoch] % rows])
    return torch.cat(parts)


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
    """How --order adaptive shuffles the raster order: the more, the larger the held-out token ECE.

    As github.com/lime413/randar.
    """

    most: command.Share = 1.0
    """largest share of an image's cells that is shuffled among themselves"""
    threshold: Annotated[float, command.Range(1e-6, 1)] = 0.05
    """ECE (15 bins of equal width, raster order) from which on `most` are shuffled"""


@dataclass(frozen=True)
class Alignment:
    """How guidance is trained into the weights: condition contrastive alignment (arXiv 2410.09347).

    An image is to be likelier than it was before the training under its own label, and less likely
    under labels of others.
    """

    weight: command.Amount = 0.0
    """of the labels of others, lambda: about the number of classes; 0: no alignment"""
    beta: Annotated[float, command.Range(1e-3, 10)] = 0.25
    """of the log-ratios; the smaller, the further: at the optimum as guidance of 1 + 1 / beta"""

    def loss(
        self, logits_PSV: torch.Tensor, before_PSV: torch.Tensor, target_PS: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of pairs, the first half under their own labels; now and before.

        An any-order model gives ln p(codes | label) in any order: the ratio is that of one each.
        """
        nats = (
            F.cross_entropy(x.flatten(0, 1).float(), target_PS.flatten(), reduction="none")
            for x in (before_PSV, logits_PSV)
        )
        was_PS, now_PS = (one.view_as(target_PS) for one in nats)
        own_B, other_B = (self.beta * (was_PS - now_PS).sum(1)).chunk(2)  # of log-ratios
        return -(F.logsigmoid(own_B) + self.weight * F.logsigmoid(-other_B)).mean()


@dataclass(frozen=True)
class OrderPolicy:
    """Which orders a training sees: one, random ones, or as much chance as the step says."""

    order: str | Path
    """of ORDERS, fixed_random, random, anneal, adaptive, or the path of an .npy"""
    anneal: Anneal
    adaptive: Adaptive
    seed: int = 0
    """of fixed_random"""

    @property
    def name(self) -> str:
        """The order by its name, or that of its file."""
        return self.order.name if isinstance(self.order, Path) else self.order

    @property
    def scan(self) -> str:
        """The order without chance, where the policy starts from or ends in."""
        if self.name == "anneal":
            return self.anneal.to
        return "raster" if self.name in ("random", "adaptive") else self.name

    @property
    def sampled(self) -> str:
        """The order to measure and to sample in: `random` if it is all random, else the scan."""
        return "random" if self.name == "random" else self.scan

    def cells(self, grid: int) -> tuple[int, ...]:
        """Return the cells of an order that is no function of the grid, to keep with the weights.

        Raises InputError for a file that holds no order.
        """
        if isinstance(self.order, Path) or self.order == orders.FIXED_RANDOM:
            return tuple(orders.scan(self.order, grid, seed=self.seed).tolist())
        return ()

    def draw(
        self, base_T: torch.Tensor, batch: int, progress: float, ece: float, generator
    ) -> torch.Tensor:
        """Return order_BS of one step.

        base_T is the order of `scan`, `progress` the share of the training that is over, and `ece`
        the last one measured on held-out codes, 0 before the first (only `adaptive` looks at it).
        """
        if self.name == "adaptive":
            share = min(1.0, ece / self.adaptive.threshold) * self.adaptive.most
            return orders.shuffled_order(base_T, batch, share, generator)
        share = float(self.name == "random")
        if self.name == "anneal":
            share = orders.random_fraction_at(progress, self.anneal.start, self.anneal.end)
        return orders.mixed_order(base_T, batch, share, generator)


def lr_at(step: int, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Return the learning rate of a step: linear 0 -> peak, then cosine to `floor` * peak.

    As RandAR (its floor is 0.05). `warmup` and `total` count optimizer steps.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def averaged(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Return the moving average of the weights, warmed up: decay min(decay, (1 + t) / (10 + t)).

    Buffers are the model's own (a codebook is an average already).
    """

    @torch.no_grad()
    def average(ema: list[torch.Tensor], now: list[torch.Tensor], t: torch.Tensor) -> None:
        torch._foreach_lerp_(ema, now, 1 - min(decay, (1 + int(t)) / (10 + int(t))))

    return AveragedModel(model, multi_avg_fn=average)


class WideMuon(torch.optim.Muon):
    """Muon in fp32: PyTorch's multiplies in bf16, which most CPUs do a hundred times slower."""

    @torch.no_grad()
    def step(self) -> None:
        """Step along the orthogonal matrix nearest to a Nesterov momentum of the gradient."""
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for p in (p for p in group["params"] if p.grad is not None):
                zeros = None if p in self.state else torch.zeros_like(p)
                momentum = self.state[p].setdefault("momentum_buffer", zeros)
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])
                x = (x.T if (tall := len(x) > x.shape[1]) else x) / x.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):  # Newton-Schulz
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.T if tall else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def make_optimizers(
    model: Method, name: OptimizerName, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return AdamW over everything, or Muon over the hidden matrices and AdamW over the rest.

    What decays are tensors of two or more dimensions but for `Method.no_decay`. Muon (Jordan et
    al., "Muon: an optimizer for hidden layers", 2024) makes a step of every hidden matrix
    orthogonal; scaled to AdamW's step size (Liu et al., arXiv 2502.16982, section 2.2), so that
    both take the same learning rate. Embeddings, norms and the output head are AdamW's.
    """
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()  # not by shape: w1 may have that of the head
        if isinstance(module, torch.nn.Linear) and name != model.head_name
    }
    adamw, muon = (
        [{"params": [], "weight_decay": w} for w in (weight_decay, 0.0)] for _ in range(2)
    )
    for path, p in model.named_parameters():
        exempt = p.ndim < 2 or any(part in path for part in model.no_decay)
        groups = muon if name == "muon" and id(p) in hidden else adamw
        groups[exempt]["params"].append(p)
    adamw, muon = ([group for group in groups if group["params"]] for groups in (adamw, muon))
    device = next(model.parameters()).device
    fused = device.type == "cuda" or None  # None: PyTorch's choice
    optimizers = [torch.optim.AdamW(adamw, lr=lr, betas=(0.9, 0.95), fused=fused)]
    if muon:
        kind = torch.optim.Muon if bf16_is_native(device) else WideMuon
        optimizers.append(kind(muon, lr=lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def flops(model: Method, batch: int) -> float:
    """Return the operations of training on one image of a batch, forward and backward."""
    order_T = model.own_order().to(next(model.parameters()).device)

    def learn(batch: int) -> None:
        order_BT, label_B = order_T.expand(batch, -1), order_T.new_zeros(batch)
        codes_BT = torch.zeros_like(order_BT)
        model.loss(model(codes_BT, label_B, order_BT), codes_BT, order_BT)[0].backward()
        model.zero_grad(set_to_none=True)

    return flops_of(learn, batch)


def parameters(model: torch.nn.Module) -> int:
    """Return the number of learned values."""
    return sum(p.numel() for p in model.parameters())


def descend(fabric, net, optimizers: list, loss: torch.Tensor, lr: float) -> None:
    """Take one step of every optimizer down the gradient of a loss, each clipped to norm 1."""
    fabric.backward(loss)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        fabric.clip_gradients(net, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def check_finite(loss: float, step: int, checkpoint: Path) -> None:
    """Raise InputError when a loss is NaN or infinite, naming the last good checkpoint."""
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step}: stopped; "
            f"the last good checkpoint is {checkpoint}; try a lower --lr"
        )


def write_log(path: Path, rows: list[dict]) -> None:
    """Write the log so far, one JSON object a line, in one rename."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def start_logger(name: LoggerName, out: Path, head: dict) -> Callable[[dict], None]:
    """Return what takes a row of the log, with its `step`. Raises InputError if not installed."""
    try:
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            board = TensorBoardLogger(out, name="", version="")
            return lambda row: board.log_metrics(dict(row), row["step"])
        if name == "wandb":
            import wandb

            same = {"name": out.name, "id": out.name, "resume": "allow"}
            run = wandb.init(project="any-order-cifar", config=head, **same)
            return lambda row: run.log(row, step=row["step"])
    except ModuleNotFoundError:
        install = {"tensorboard": "uv sync --extra tensorboard", "wandb": "uv pip install wandb"}
        raise InputError(f"--logger {name} is not installed; run: {install[name]}") from None
    return lambda row: None
