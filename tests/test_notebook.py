"""The notebook of stage 2 is a page: short, without leftovers, and it runs from top to bottom."""

import ast
import re
import sys
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
import torch
from helpers import script
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from models.artifacts import ROOT
from models.data import CLASSES, save_splits
from models.tokenizer import load_tokenizer

NOTEBOOK = ROOT / "tokenizer_vq/vq-vae.ipynb"
TINY = """
import sys
from pathlib import Path

from models.vqvae import VQVAEConfig

folder = Path({folder!r})
cfg = TokenizerConfig(
    data=folder, out=folder / "tiny.pth", model=VQVAEConfig(codebook_size=16, width=8, blocks=1),
    steps=6, batch=16, warmup=2, log_every=1, save_every=3, device="cpu",
)
fid_features, feature_cache = "64", folder / "features"
print(sys.executable)
"""


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_a_page(notebook):
    cells = code_cells(notebook)
    assert len(cells) <= 12 and max(len(cell.source.splitlines()) for cell in cells) <= 8
    for cell in cells:
        assert cell.outputs == [] and cell.execution_count is None
        nodes = list(ast.walk(ast.parse(cell.source)))  # magics and !commands are no Python
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in nodes)
    assert cells[0].metadata.tags == ["parameters"] and "cfg = TokenizerConfig()" in cells[0].source


def write_random_inception(path: Path) -> None:
    """Write weights of no worth where a download would put the real ones."""
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["64"], str(path))
    torch.save(network.state_dict(), path)


@pytest.fixture
def kernel_home(tmp_path, monkeypatch) -> Path:
    """Let a kernel run this very Python, keep its files in tmp_path and find weights there."""
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    write_kernel_spec(tmp_path / "JUPYTER_PATH/kernels/python3")
    weights = URL_INCEPTION_V3.rsplit("/", 1)[-1]
    write_random_inception(tmp_path / "TORCH_HOME/hub/checkpoints" / weights)
    return tmp_path


def run_tiny(notebook, folder: Path) -> None:
    """Execute the page, outputs and all, with a tiny config set after the first code cell."""
    make_shapes = script("data/shapes.py").make_shapes
    arrays = {"train": make_shapes(128, 0), "test": make_shapes(40, 1)}
    save_splits(folder, arrays, CLASSES["shapes"], "shapes", "test", {})
    config = notebook.cells.index(code_cells(notebook)[0])
    tiny = nbformat.v4.new_code_cell(TINY.format(folder=str(folder)))
    notebook.cells.insert(config + 1, tiny)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()


def test_the_notebook_runs(notebook, kernel_home):
    run_tiny(notebook, kernel_home)
    outputs = {cell.id: cell.outputs for cell in code_cells(notebook)}
    pictures = {
        name
        for name, found in outputs.items()
        if any("image/png" in o.get("data", {}) for o in found)
    }
    assert pictures == {"images", "curves", "reconstructions", "usage", "psnr", "mirror"}
    streams = [o for found in outputs.values() for o in found if o.output_type == "stream"]
    printed = "".join(o.text for o in streams if o.name == "stdout")
    assert sys.executable in printed
    _, about = load_tokenizer(kernel_home / "tiny.pth")
    assert f"test PSNR {about['test']['psnr']:.2f} dB, sd" in printed
    assert f"codebook usage {about['test']['codebook_usage']:.1%}, perplexity" in printed
    assert re.search(r"^\d+\.\d% of the codes agree$", printed, re.M)
    assert re.search(r"^rFID64 \d+\.\d\d, 40 images$", printed, re.M)
    assert not re.search(r"FID\b|Inception Distance", "".join(o.text for o in streams))


def test_without_inception_there_is_a_line_and_no_fid(notebook, capsys):
    (source,) = (cell.source for cell in code_cells(notebook) if cell.id == "rfid")
    exec(source, {"ruler": None})
    printed = capsys.readouterr().out
    assert printed.startswith("no rFID: set inception_weights") and printed.count("\n") == 1
