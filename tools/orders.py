#!/usr/bin/env -S uv run
"""Draw every order, and generators decoding in theirs side by side: results/orders/index.html."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from models.pictures import order_figure, save_figure

from metrics.likelihood import orders_for
from models.artifacts import ROOT, replace_file, write_text
from models.checkpoint import Generator, load_generator
from models.errors import InputError, expect_at_least, one_line_errors
from models.gallery import gif, page, pair, picture, png_file, reveal_frames, stacked_frames
from models.orders import SCANS, scan
from models.sampling import Plan, sample_chance, sample_codes
from models.tokenizer import Tokenizer, decode_codes, find_tokenizer, load_tokenizer

GRID = 8
CLASSES_SHOWN = 5
MILLISECONDS = 80
"""of a network call in the animations"""


@dataclass(frozen=True)
class OrdersConfig:
    """Draw the orders, and animate generators."""

    checkpoints: tuple[Path, ...] = ()
    """generators to animate: last.pth of runs, or files in checkpoints/"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made a generator's codes"""
    steps: tuple[int, ...] = (64, 16)
    """network calls an image, for methods that decode in parallel; others take their own number"""
    cfg: float = 2.0
    """guidance scale"""
    seed: int = 0
    out: Path = ROOT / "results/orders"

    def check(self) -> None:
        """Raise InputError for numbers that nothing can be drawn with."""
        expect_at_least(self, seed=0, cfg=0)
        if not self.steps or min(self.steps) < 1:
            raise InputError(f"expected --steps >= 1, got {self.steps}")


def plans(cfg: OrdersConfig, generator: Generator) -> list[Plan]:
    """Return how to sample a generator: in its own order, in each number of steps it can take."""
    model = generator.model
    free = model.any_order and model.parallel
    steps = [None] if not free else [s for s in cfg.steps if s <= model.config.tokens]
    return [Plan(order=generator.order, steps=s, cfg=cfg.cfg) for s in steps]


def decoding(
    generator: Generator, tokenizer: Tokenizer, plan: Plan, seed: int
) -> tuple[str, list[np.ndarray]]:
    """Return a caption, and one image each of the first classes after every network call."""
    head, model = generator.header, generator.model
    count = min(CLASSES_SHOWN, model.config.classes)
    images_NHWC = decode_codes(tokenizer, sample_codes(model, torch.arange(count), plan, seed))
    order_NS = orders_for(model, plan.order, count, seed)
    sizes, _ = plan.groups(model)
    frames = reveal_frames(images_NHWC, order_NS.numpy(), model.config.grid, sizes)
    return f"{head['method']}, {plan.order} order, {len(sizes)} steps", frames


def main(cfg: OrdersConfig) -> Path:
    """Write orders.png, decoding.gif and index.html; return the page's path."""
    cfg.check()
    generators = [load_generator(path) for path in cfg.checkpoints]
    tokenizers = [
        load_tokenizer(find_tokenizer(g.header["inputs"]["tokenizer"], cfg.tokenizer))[0]
        for g in generators
    ]
    orders = {name: scan(name, GRID) for name in SCANS}
    orders["random"] = sample_chance(cfg.seed, range(1), GRID**2)[1][0]
    orders = {name: order_S.numpy() for name, order_S in orders.items()}
    save_figure(order_figure(orders, GRID), cfg.out / "orders.png")
    sections = {
        "Orders": png_file(cfg.out / "orders.png", "The step at which each cell is visited")
    }
    shown = [
        decoding(generator, tokenizer, plan, cfg.seed)
        for generator, tokenizer in zip(generators, tokenizers, strict=True)
        for plan in plans(cfg, generator)
    ]
    if shown:
        together = gif(stacked_frames(shown), MILLISECONDS)
        replace_file(cfg.out / "decoding.gif", lambda file: file.write(together))
        sections["Decoding"] = pair(
            [
                picture(gif(frames, MILLISECONDS), "gif", caption, pixels=True)
                for caption, frames in shown
            ]
        )
    introduction = (
        "An image is an 8x8 grid of codes. An order says which cell is generated when: a fixed "
        "scan, or a new random order for every image. Methods differ in how the network is told."
    )
    write_text(cfg.out / "index.html", page("Orders", introduction, sections))
    print(f"wrote {cfg.out / 'orders.png'} and {cfg.out / 'index.html'}")
    return cfg.out / "index.html"


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(OrdersConfig))
