"""The notebook of stage 2 is a page: short, rendered, and it runs from top to bottom."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from helpers import script
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from PIL import Image

from models.artifacts import ROOT, header
from models.checkpoint import save_generator
from models.classifier import KIND, PerceptualNet, save_perceptual
from models.data import CLASSES, save_splits
from models.methods import build
from models.tokenizer import load_tokenizer
from models.transformer import ModelConfig

NOTEBOOK = ROOT / "tokenizer_vq/vq-vae.ipynb"
PAGES = [NOTEBOOK, *sorted((ROOT / "notebooks").glob("*.ipynb"))]
DRAWN = {"images", "curves", "reconstructions", "error", "usage", "psnr", "mirror"}
TINY = """
import sys
from pathlib import Path

from models.vqvae import VQVAEConfig

folder = Path({folder!r})
cfg = TokenizerConfig(
    data=folder, out=folder / "tiny.pth", model=VQVAEConfig(codebook_size=16, width=8, blocks=1),
    init=None, perceptual_weights=folder / "judge.pth", steps=6, batch=16, warmup=2, log_every=1,
    save_every=3, device="cpu",
)
print(sys.executable)
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def drawn(notebook) -> set[str]:
    """The names of the cells that show a picture."""
    names = set()
    for cell in code_cells(notebook):
        names |= {cell.id for output in cell.outputs if "image/png" in output.get("data", {})}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_is_a_rendered_page(page):
    cells = code_cells(nbformat.read(page, as_version=4))
    assert len(cells) <= 12 and max(len(cell.source.splitlines()) for cell in cells) <= 8
    for cell in cells:
        nodes = list(ast.walk(ast.parse(cell.source)))  # magics and !commands are no Python
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
        assert cell.execution_count is None and "execution" not in cell.metadata
        assert not any(o.get("name") == "stderr" for o in cell.outputs)
    assert cells[0].metadata.tags == ["parameters"]
    assert page == NOTEBOOK or any(cell.outputs for cell in cells)
    text = page.read_text()
    assert len(text) < 1e6 and str(ROOT) not in text and str(Path.home()) not in text


@pytest.fixture
def kernel_home(tmp_path, monkeypatch) -> Path:
    """Let a kernel run this very Python and keep its files in tmp_path."""
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    write_kernel_spec(tmp_path / "JUPYTER_PATH/kernels/python3")
    return tmp_path


def test_the_notebook_runs(notebook, kernel_home):
    make_shapes = script("data/shapes.py").make_shapes
    arrays = {"train": make_shapes(128, 0), "test": make_shapes(40, 1)}
    save_splits(kernel_home, arrays, CLASSES["shapes"], "shapes", "test", {})
    save_perceptual(kernel_home / "judge.pth", PerceptualNet((4, 6, 8, 10)).fold(), {"kind": KIND})
    config = notebook.cells.index(code_cells(notebook)[0])
    tiny = nbformat.v4.new_code_cell(TINY.format(folder=str(kernel_home)))
    notebook.cells.insert(config + 1, tiny)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()
    assert drawn(notebook) == DRAWN
    outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
    printed = "".join(o.text for o in outputs if o.get("name") == "stdout")
    assert sys.executable in printed
    _, about = load_tokenizer(kernel_home / "tiny.pth")
    assert f"test PSNR {about['test']['psnr']:.2f} dB, sd" in printed
    assert f"codebook usage {about['test']['codebook_usage']:.1%}, perplexity" in printed
    assert re.search(r"^\d+\.\d% of the codes agree$", printed, re.M)
    assert len(re.findall(r"perceptual distance 0\.\d{3}$", printed, re.M)) == 2


def test_the_pages_of_runs_and_orders_run(world, kernel_home):
    torch.manual_seed(0)
    model = build("randar", ModelConfig(vocab_size=32, layers=1, width=16, heads=2))
    inputs = {"tokenizer": load_tokenizer(world.tokenizer)[1]["sha256"]}
    head = header("generator", "tests", {"order": "random"}, inputs) | {"method": "randar"}
    save_generator(kernel_home / "last.pth", head, model)
    tiny = f"""
from pathlib import Path

out, tokenizer = Path({str(kernel_home)!r}), Path({str(world.tokenizer)!r})
checkpoints, grids, count, calls = [out / "last.pth"], [], 2, (64, 7)
"""
    for page in PAGES[1:]:
        notebook = nbformat.read(page, as_version=4)
        config = notebook.cells.index(code_cells(notebook)[0])
        notebook.cells.insert(config + 1, nbformat.v4.new_code_cell(tiny))
        where = {"metadata": {"path": str(page.parent)}}
        NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()
        shown = [str(o.get("data", "")) for cell in code_cells(notebook) for o in cell.outputs]
        assert any("randar trained in random" in one and "image/gif" in one for one in shown)
        assert any("image/png" in one for one in shown)
    with Image.open(kernel_home / "decoding.gif") as moving:
        assert moving.n_frames == 65
    assert (kernel_home / "orders.png").exists()
