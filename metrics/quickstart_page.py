"""The page of the quickstart: what its stages left, in one file."""

import shlex
from pathlib import Path

import torch

from metrics.likelihood import orders_for
from metrics.stages import Ran
from models.artifacts import write_text
from models.checkpoint import load_generator
from models.gallery import command, gif, page, pair, picture, png_file, reveal_frames, table
from models.sampling import Plan, sample_codes
from models.tokenizer import decode_codes, load_tokenizer


def generation(tokenizer_path: Path, run: Path, plan: Plan, count: int = 6) -> bytes:
    """Return a GIF of `count` images being generated, one class each."""
    model = load_generator(run / "last.pth").model
    tokenizer, _ = load_tokenizer(tokenizer_path)
    images_NHWC = decode_codes(tokenizer, sample_codes(model, torch.arange(count), plan, seed=1))
    order_NS = orders_for(model, plan.order, count, seed=1)
    return gif(reveal_frames(images_NHWC, order_NS.numpy(), model.config.grid))


def numbers(found: dict[str, dict]) -> str:
    """Return the table of both metrics.json, with the same measures of real images beside them."""
    head = ["", *(f"{order} order" for order in found), "real test images"]
    measured, first = list(found.values()), next(iter(found.values()))
    rows = [
        [f"bits per test image, read in {order} order"]
        + [f"{m['bits_per_image'][order]['mean']:.1f}" for m in measured]
        + [""]
        for order in first["bits_per_image"]
    ]
    rows += [
        [name, *(f"{m['samples'][name]:.3f}" for m in measured), f"{real:.3f}"]
        for name, real in first["control"].items()
    ]
    rows += [["images per second", *(f"{m['images_per_second']:.1f}" for m in measured), ""]]
    return table(head, rows)


def write_page(
    out: Path, method: str, found: dict[str, dict], guidance: float, done: list[Ran]
) -> Path:
    """Write index.html from what the stages left; `found` is metrics.json of each order."""
    runs = {order: out / f"{method}_{order}" for order in found}
    samples = {order: out / f"samples_{order}" for order in found}
    plans = {order: Plan(order=order, cfg=guidance) for order in found}
    moving = {o: generation(out / "tokenizer.pth", run, plans[o]) for o, run in runs.items()}
    said = [[ran.name, f"{ran.seconds:.0f}"] for ran in done]
    commands = "\n".join(shlex.join(["uv", "run", *ran.line]) for ran in done)
    sections = {
        "Samples, one class a row": pair(
            [png_file(path / "samples.png", f"{o} order") for o, path in samples.items()]
        ),
        "Six images being generated": pair(
            [picture(content, "gif", f"{o} order", pixels=True) for o, content in moving.items()]
        ),
        "Numbers": numbers(found),
        "The tokenizer": png_file(out / "tokenizer.reconstructions.png", "Test images and decoded")
        + png_file(out / "tokenizer.png", "Training"),
        "The generators": "".join(
            png_file(run / "curves.png", f"Training, {o} order") for o, run in runs.items()
        ),
        "How this page was made": table(["stage", "seconds"], said) + command(commands),
    }
    introduction = (
        "An image becomes an 8x8 grid of codes, and a transformer generates the 64 codes one after "
        f"another. Here {method} learned it in {' and in '.join(found)} order."
    )
    content = page("Quickstart: images in any token order", introduction, sections)
    write_text(out / "index.html", content)
    return out / "index.html"
