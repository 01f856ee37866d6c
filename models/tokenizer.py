"""The tokenizer as an artifact: saved by stage 2 or imported, read by stages 3 to 5."""

from dataclasses import asdict
from pathlib import Path

import torch

from models.artifacts import ROOT, load_checkpoint, save_checkpoint, sha256_of
from models.baseline_vqvae import BaselineConfig, BaselineVQVAE
from models.errors import InputError
from models.vq16 import VQ16, VQ16Config
from models.vqvae import VQVAE, VQVAEConfig

KIND = "tokenizer"
TOKENIZERS = {
    "vqvae": (VQVAE, VQVAEConfig),
    "vq16": (VQ16, VQ16Config),
    "baseline_vqvae": (BaselineVQVAE, BaselineConfig),
}
"""Class and config by the `model` of a header; a header without one is of a `vqvae`."""
Tokenizer = VQVAE | VQ16 | BaselineVQVAE


def save_tokenizer(path: Path, model: Tokenizer, head: dict) -> None:
    """Write the weights of a tokenizer under the header `head`, of kind "tokenizer"."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    head = head | {"model": next(n for n, (kind, _) in TOKENIZERS.items() if kind is type(model))}
    save_checkpoint(path, head, model_config=asdict(model.config), model=state)


def load_tokenizer(path: Path) -> tuple[Tokenizer, dict]:
    """Return a tokenizer in eval mode and its header, `sha256` of the file added.

    Raises InputError for a file that is missing, broken or no tokenizer.
    """
    found = load_checkpoint(path, KIND, rerun="uv run tokenizer_vq/train_vqvae.py")
    try:
        kind, config = TOKENIZERS[found["header"].get("model", "vqvae")]
        model = kind(config(**found["model_config"]))
        model.load_state_dict(
            {name: value.to(_dtype(value)) for name, value in found["model"].items()}
        )
    except (KeyError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:150]
        raise InputError(f"{path} is no tokenizer of this version ({reason})") from None
    model.requires_grad_(False).eval()
    return model, found["header"] | {"sha256": sha256_of(Path(path))}


def find_tokenizer(sha256: str | None, asked: Path | None = None) -> Path:
    """Return the tokenizer file with this sha256: `asked`, or one the repo has.

    Raises InputError if `asked` is another tokenizer, if none of the repo's is the one, or for a
    generator that was imported without one (None).
    """
    if sha256 is None:
        raise InputError(
            "the generator was imported without a tokenizer, so nothing says what its codes mean; "
            "run tools/import_checkpoint.py again with --tokenizer"
        )
    places = ("tokenizer_vq/*.pth", "checkpoints/*.pth", "data/*/tokenizer.pth")
    here = [path for place in places for path in sorted(ROOT.glob(place))]
    for path in [asked] if asked else here:
        if not path.exists():
            raise InputError(f"expected a tokenizer at {path}, found nothing")
        if sha256_of(path) == sha256:
            return path
    looked = f"{asked} is not it" if asked else f"none of {', '.join(places)} is it"
    raise InputError(
        f"the generator was trained on codes of tokenizer {sha256[:12]}.., and {looked}; give its "
        "--tokenizer, or train on the codes of the one you have"
    )


def _dtype(value: torch.Tensor) -> torch.dtype:
    """Weights may be shipped in half precision; they run in fp32."""
    return torch.float32 if value.is_floating_point() else value.dtype
