#!/usr/bin/env -S uv run
"""Relabel codes by clusters, for --cluster-weight. Tokenizer + codes -> data/codes_clustered/.

The new tokenizer decodes the new codes to the very images that the old one decodes the old codes
to; only the numbers of the codes change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from metrics.pictures import plot_clusters, save_figure
from models import command
from models.artifacts import ROOT, header, save_array, sha256_of
from models.checkpoint import load_codes_of
from models.cluster_loss import balanced_kmeans, relabelling, spread
from models.command import InputError, run
from models.data import SPLITS, save_codes
from models.tokenizer import CODES_OF, decode_codes, load_tokenizer, save_tokenizer
from models.vqvae import VQVAE

PRODUCER = "tools/cluster_codebook.py"


@dataclass(frozen=True)
class ClusterConfig(command.Config):
    """Relabel the codes so that similar ones are neighbours, in clusters of equal size (IAR)."""

    tokenizer: Path = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    """from stage 2"""
    codes: Path = ROOT / "data/codes"
    """folder from stage 3, of that tokenizer"""
    out: command.OutFolder = ROOT / "data/codes_clustered"
    """folder for the new codes, tokenizer.pth, relabelling.npy, inverse.npy and clusters.png"""
    cluster_size: Annotated[int, command.Range(2, 2**20)] = 32
    """codes in a cluster; must divide the codebook"""
    iterations: command.Count = 100
    """of k-means, at most"""
    seed: command.Seed = 0

    def check(self) -> None:
        if self.out.resolve() == self.tokenizer.resolve().parent:
            raise InputError(f"expected another --out than the tokenizer's folder, got {self.out}")


def write_relabelled(
    cfg: ClusterConfig, new_of_old_V: torch.Tensor, model: VQVAE, old: dict, splits: dict
) -> None:
    """Write the tokenizer, whose header was `old`, then all that names it: {split: Codes} too."""
    old_of_new_V = new_of_old_V.argsort()
    model.quantizer.relabel(old_of_new_V)
    head = header("tokenizer", PRODUCER, cfg, old["inputs"] | {"tokenizer": old["sha256"]})
    # no CODES_OF: these are no longer the codes of the tokenizer whose decoder was trained on
    same = {key: value for key, value in old.items() if key not in ("sha256", CODES_OF)}
    save_tokenizer(cfg.out / "tokenizer.pth", model, same | head)
    tokenizer = {"tokenizer": sha256_of(cfg.out / "tokenizer.pth")}
    for split, codes in splits.items():
        inputs = codes.header["inputs"] | tokenizer | {"codes": codes.header["sha256"]}
        same = {key: codes.header[key] for key in ("codebook_size", "grid", "classes", "dataset")}
        head = header("codes", PRODUCER, cfg, inputs) | same | {"cluster_size": cfg.cluster_size}
        new_NAT = new_of_old_V[codes.codes_NAT]
        save_codes(cfg.out, split, new_NAT.numpy(), codes.label_N.numpy(), head)
    inputs = tokenizer | {"old_tokenizer": old["sha256"]}
    for name, ids_V in (("relabelling", new_of_old_V), ("inverse", old_of_new_V)):
        head = header(name, PRODUCER, cfg, inputs) | {"cluster_size": cfg.cluster_size}
        save_array(cfg.out / f"{name}.npy", ids_V.numpy(), head)


def main(cfg: ClusterConfig) -> Path:
    """Cluster, relabel, write; return the new folder. Raises InputError if inputs do not fit."""
    model, old = load_tokenizer(cfg.tokenizer)
    if not isinstance(model, VQVAE):
        raise InputError(f"expected a VQVAE of ours, {cfg.tokenizer} is an imported tokenizer")
    made_with = {"inputs": {"tokenizer": old["sha256"]}}
    splits = {s: load_codes_of(made_with, cfg.codes, s, cfg.tokenizer) for s in SPLITS}
    vectors_VC, size = model.quantizer.codebook_VC, cfg.cluster_size
    if len(vectors_VC) % size:
        raise InputError(
            f"expected --cluster-size to divide the {len(vectors_VC)} codes of {cfg.tokenizer}, "
            f"got {size}"
        )
    clusters = len(vectors_VC) // size
    cluster_V = balanced_kmeans(vectors_VC, clusters, cfg.seed, cfg.iterations)
    generator = torch.Generator().manual_seed(cfg.seed)
    random_V = torch.randperm(len(vectors_VC), generator=generator) % clusters
    print(
        f"{clusters} clusters of {size}: mean distance within {spread(vectors_VC, cluster_V):.3f}, "
        f"in random clusters {spread(vectors_VC, random_V):.3f}"
    )
    write_relabelled(cfg, relabelling(cluster_V), model, old, splits)
    codes_VT = torch.arange(len(vectors_VC)).unsqueeze(1).expand(-1, model.grid**2)
    images_VHWC = decode_codes(model, codes_VT)  # each code amid its like
    side = images_VHWC.shape[1] // model.grid
    middle = slice(model.grid // 2 * side, (model.grid // 2 + 1) * side)
    save_figure(plot_clusters(images_VHWC[:, middle, middle], size), cfg.out / "clusters.png")
    print(
        f"wrote {cfg.out}; now: uv run train_c2i.py --cluster-weight 1 --codes {cfg.out} "
        f"--tokenizer {cfg.out}/tokenizer.pth"
    )
    return cfg.out


if __name__ == "__main__":
    run(main, ClusterConfig)
