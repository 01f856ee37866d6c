"""Files that are broken, foreign or hostile: one clear line, nothing run, nothing written."""

import os
from argparse import Namespace

import pytest
import torch
from helpers import Evil
from published_layouts import draw
from tiny_published import imported, layout, save_legacy

from models.command import one_line_errors


@pytest.mark.parametrize("inside", ["beside", "namespace", "weights"])
@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize(("what", "asks"), [(os.system, "system"), (eval, "eval")])
def test_code_in_a_file_is_not_run(what, asks, save, inside, tmp_path):
    mark = tmp_path / "it_ran"
    code = f"touch {mark}" if what is os.system else f"open({str(mark)!r}, 'w').close()"
    evil = Evil(code, what)
    contents = {"model": draw(layout("gpt"))}
    if inside == "weights":
        contents["model"]["norm.weight"] = evil
    else:
        contents["args"] = evil if inside == "beside" else Namespace(lr=1e-4, hook=evil)
    save(contents, tmp_path / "w.pt")
    told = pytest.raises(SystemExit, match=rf"asks for \S*{asks}.*nothing in it was run")
    with told as refused, one_line_errors():
        imported(tmp_path / "w.pt", tmp_path)
    assert str(refused.value).count("\n") == 0
    assert not mark.exists() and not (tmp_path / "ours.pth").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert mark.exists()  # so the file was able to
