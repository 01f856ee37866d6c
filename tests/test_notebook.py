"""The notebook of stage 2 is a page: short, rendered, and it runs from top to bottom."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import save_tiny
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from PIL import Image

from models.artifacts import ROOT
from models.tokenizer import load_tokenizer

NOTEBOOK = ROOT / "tokenizer_vq/vq-vae.ipynb"
PAGES = [NOTEBOOK, *sorted((ROOT / "notebooks").glob("*.ipynb"))]
DRAWN = {"images", "curves", "reconstructions", "error", "usage", "psnr", "mirror"}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


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
def execute(tmp_path, monkeypatch):
    """Run a page with more settings after its first cell; return its code cells.

    The kernel is this very Python and keeps its files in tmp_path.
    """
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    write_kernel_spec(tmp_path / "JUPYTER_PATH/kernels/python3")

    def run(page: Path, settings: str) -> list:
        notebook = nbformat.read(page, as_version=4)
        after = notebook.cells.index(code_cells(notebook)[0]) + 1
        code = f"from pathlib import Path\nout = Path({str(tmp_path)!r})\n{settings}"
        notebook.cells.insert(after, nbformat.v4.new_code_cell(code))
        where = {"metadata": {"path": str(page.parent)}}
        NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()
        return code_cells(notebook)

    return run


def test_the_notebook_runs(world, perceptual, tmp_path, execute):
    cells = execute(
        NOTEBOOK,
        f"""
import sys
from models.vqvae import VQVAEConfig
cfg = TokenizerConfig(
    data=Path({str(world.data)!r}), out=out / "tiny.pth", init=None, device="cpu",
    model=VQVAEConfig(codebook_size=16, width=8, blocks=1), steps=6, batch=16, warmup=2,
    perceptual_weights=Path({str(perceptual)!r}), log_every=1, save_every=3,
)
print(sys.executable)
""",
    )
    outputs = [(cell.id, output) for cell in cells for output in cell.outputs]
    assert {id for id, output in outputs if "image/png" in output.get("data", {})} == DRAWN
    printed = "".join(o.text for _, o in outputs if o.get("name") == "stdout")
    assert sys.executable in printed
    _, about = load_tokenizer(tmp_path / "tiny.pth")
    assert f"test PSNR {about['test']['psnr']:.2f} dB, sd" in printed
    assert f"codebook usage {about['test']['codebook_usage']:.1%}, perplexity" in printed


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_the_other_pages_run(world, tmp_path, execute, page):
    save_tiny(tmp_path / "last.pth", world, order="random")
    settings = 'checkpoints, grids, count, calls = [out / "last.pth"], [], 2, (64, 7)'
    settings += f"\ncheckpoint, data = checkpoints[0], Path({str(world.data)!r})"
    cells = execute(page, f"tokenizer = Path({str(world.tokenizer)!r})\n{settings}")
    shown = [str(o.get("data", "")) for cell in cells for o in cell.outputs]
    assert any("randar trained in random" in one and "image/gif" in one for one in shown)
    assert any("image/png" in one for one in shown)
    if page.stem == "orders":
        with Image.open(tmp_path / "decoding.gif") as moving:
            assert moving.n_frames == 65
        assert (tmp_path / "orders.png").exists()
