"""What a training run shows of itself: held-out and test likelihood, curves, sample grids."""

from pathlib import Path

import torch

from metrics.calibration import collect, ece, equal_width_edges
from metrics.likelihood import bits_per_code, logit_batches, orders_for
from models.data import Codes, evenly
from models.method import Method
from models.pictures import class_grid, curve_figure, save_figure
from models.sampling import Plan, sample_codes
from models.tokenizer import decode_codes, load_tokenizer
from models.training import write_log
from models.vqvae import VQVAE

EVAL_IMAGES = 2_000
"""images of a likelihood estimate during training; eval_c2i.py takes them all"""
PANELS = {
    "bits per code": ["train_bits", "heldout_bits", "test_bits", "cluster_bits"],
    "learning rate": ["lr"],
    "images per second": ["images_per_second"],
}


def tokenizer_of(path: Path, codes: Codes) -> VQVAE | None:
    """Return the tokenizer at `path` if it is the one that made the codes, else None."""
    if not path.exists():
        return None
    tokenizer, about = load_tokenizer(path)
    made_them = about["sha256"] == codes.header["inputs"]["tokenizer"]
    return tokenizer.to(codes.label_N.device) if made_them else None


def _to_measure(model: Method, codes: Codes, order: str) -> tuple[torch.Tensor, ...]:
    """Return (codes_NT, label_N, order_NS) of EVAL_IMAGES images, evenly spaced and unmirrored."""
    codes = codes.rows(torch.from_numpy(evenly(len(codes.label_N), EVAL_IMAGES)))
    label_N = codes.label_N
    return codes.codes_NAT[:, 0], label_N, orders_for(model, order, len(label_N))


def split_bits(model: Method, splits: dict[str, Codes], order: str) -> dict[str, float]:
    """Return the mean bits per code of EVAL_IMAGES images of each split, unmirrored."""
    model.eval()
    found = {}
    for name, codes in splits.items():
        found[name] = bits_per_code(model, *_to_measure(model, codes, order)).mean().item()
    return found


def token_ece(model: Method, codes: Codes, order: str) -> float:
    """Return the top-label ECE of EVAL_IMAGES images, unmirrored, in 15 bins of equal width."""
    model.eval()
    tokens = collect(logit_batches(model, *_to_measure(model, codes, order)))
    return ece(tokens, equal_width_edges())["value"]


def show_progress(
    out: Path,
    rows: list[dict],
    model: Method,
    tokenizer: VQVAE | None,
    classes: list[str],
    order: str,
) -> None:
    """Write metrics.jsonl, curves.png and, with a tokenizer, samples/<step>.png (cfg 1 -> 2)."""
    write_log(out / "metrics.jsonl", rows)
    save_figure(curve_figure(rows, PANELS), out / "curves.png")
    if tokenizer is None:
        return
    model.eval()
    label_N = torch.arange(len(classes)).repeat_interleave(8)
    codes_NT = sample_codes(model, label_N, Plan(order=order, cfg=2.0), seed=0)
    figure = class_grid(decode_codes(tokenizer, codes_NT), label_N.numpy(), classes)
    save_figure(figure, out / f"samples/{rows[-1]['step']:07d}.png")
