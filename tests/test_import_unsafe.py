"""Files that are broken, foreign or hostile: one clear line, nothing run, nothing written."""

import os
import pickle
from argparse import Namespace

import pytest
import torch
from helpers import Evil
from published_layouts import draw
from tiny_published import imported, layout, save_legacy

from models.command import InputError, one_line_errors


@pytest.mark.parametrize("inside", ["beside", "namespace", "weights"])
@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize(("what", "asks"), [(os.system, "system"), (eval, "eval")])
def test_code_in_a_file_is_not_run(what, asks, save, inside, tmp_path):
    mark = tmp_path / "it_ran"
    code = f"touch {mark}" if what is os.system else f"open({str(mark)!r}, 'w').close()"
    evil = Evil(code, what)
    contents = {"model": draw(layout("gpt"))}
    if inside == "beside":
        contents["args"] = evil
    elif inside == "namespace":
        contents["args"] = Namespace(lr=1e-4, hook=evil)
    else:
        contents["model"]["norm.weight"] = evil
    save(contents, tmp_path / "w.pt")
    told = pytest.raises(SystemExit, match=rf"asks for \S*{asks}.*nothing in it was run")
    with told as refused, one_line_errors():
        imported(tmp_path / "w.pt", tmp_path)
    assert str(refused.value).count("\n") == 0
    assert not mark.exists() and not (tmp_path / "ours.pth").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert mark.exists()  # so the file was able to


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps([1, 2]), "torn"])
def test_broken_and_foreign_files_end_in_one_line(name, content, tmp_path):
    if content == "torn":
        torch.save(draw(layout("gpt")), tmp_path / "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()[:-2000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="w.(pt|safetensors)"):
        imported(tmp_path / name, tmp_path)
    with pytest.raises(InputError, match="no such file"):
        imported(tmp_path / "nowhere.pt", tmp_path)
