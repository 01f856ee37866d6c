"""What a file says of itself, and where it comes from."""

import pytest
from helpers import script

from models.command import InputError

tool = script("tools/inspect_file.py")


def test_a_file_shows_its_header_its_shapes_and_what_it_was_made_from(world, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", world.data.parent)
    monkeypatch.setattr(tool, "PLACES", ("data/*.npy", "*.pth"))
    tool.main(tool.InspectConfig(world.codes / "test_codes.npy"))
    lines = capsys.readouterr().out.splitlines()
    assert "test_codes.npy: codes, intact, sha256 " in lines[0]
    assert lines[1].startswith("  uint16 (40, 2, 64), ")
    made_from = lines[lines.index("made from") + 1 :]
    for start, end in (("  tokenizer ", ": tokenizer.pth"), ("    test_images ", "_images.npy")):
        assert any(line.startswith(start) and line.endswith(end) for line in made_from)
    tool.main(tool.InspectConfig(world.tokenizer))
    text = capsys.readouterr().out
    assert "tokenizer.pth: tokenizer, intact" in text and "config.steps: 6" in text
    assert " tensors, " in text and "NaN" not in text


def test_a_file_that_is_not_intact_is_said_to_be_so(world, tmp_path):
    for source in (world.data / "test_images.npy", world.tokenizer):
        raw = bytearray(source.read_bytes())
        raw[len(raw) // 2] ^= 1
        path = tmp_path / source.name
        path.write_bytes(raw)
        sidecar = source.with_name(source.name + ".json")
        if sidecar.exists():
            (tmp_path / sidecar.name).write_bytes(sidecar.read_bytes())
        with pytest.raises(InputError, match=f"{source.name} is (not the array|broken)"):
            tool.main(tool.InspectConfig(path))
