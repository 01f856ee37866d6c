"""Published weights become ours exactly: every naming, wrapper and format, and nothing but them."""

import hashlib
import importlib

import pytest
import torch
from helpers import eval_config, script
from published_layouts import LAYOUTS, draw, vq16
from tiny_published import (
    CLASSES,
    CODES,
    FILES,
    GRID,
    HEADS,
    REGIONS,
    TOKENS,
    imported,
    layout,
    prefixed,
    stray,
    tool,
    trained,
)

from models.artifacts import load_checkpoint
from models.checkpoint import load_generator
from models.command import InputError, one_line_errors
from models.methods import METHODS, build
from models.orders import mixed_order, region_scan, scan
from models.published.sizes import infer_config, recognise
from models.published.weights import Published, restore
from models.training import parameters

stage = script("eval_c2i.py")
BATCH = 5
REFERENCES = {"gpt": "reference_llamagen"}
"""where a method's reference is, if not in reference_<method>"""


@pytest.mark.parametrize(
    ("method", "name"),
    [*(("arpg", name) for name in FILES), *((method, "trained.pt") for method in METHODS)],
)
def test_every_tensor_arrives_from_every_kind_of_file(method, name, tmp_path):
    weights = draw(layout(method))
    FILES[name](weights, tmp_path / name)
    found = load_generator(imported(tmp_path / name, tmp_path))
    assert type(found.model) is METHODS[method]
    state = found.model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert found.header["config"]["steps"] == (1234 if name == "trained.pt" else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path):
    weights = {name: value.to(dtype) for name, value in draw(layout("gpt")).items()}
    torch.save(weights, tmp_path / "w.pt")
    found = load_checkpoint(imported(tmp_path / "w.pt", tmp_path), "generator", "")["model"]
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert {value.dtype for value in found.values()} == {dtype}


def test_averaged_weights_can_be_asked_for(tmp_path):
    weights = draw(layout("randar"))
    torch.save(trained(weights), tmp_path / "w.pt")
    found = load_generator(imported(tmp_path / "w.pt", tmp_path, weights="ema")).model.state_dict()
    assert all(torch.equal(found[name], value + 1) for name, value in weights.items())
    torch.save({"model": weights}, tmp_path / "plain.pt")
    with pytest.raises(InputError, match="no ema weights, only: model"):
        imported(tmp_path / "plain.pt", tmp_path, weights="ema")


def test_an_imported_model_computes_what_the_formulas_say(method, tmp_path):
    weights = draw(layout(method, layers=4))
    torch.save(weights, tmp_path / "w.pt")
    model = load_generator(imported(tmp_path / "w.pt", tmp_path)).model.double()
    generator = torch.Generator().manual_seed(1)
    codes_BT = torch.randint(CODES, (BATCH, TOKENS), generator=generator)
    # CLASSES is the null label; with as many images as labels RAR modulates once a label
    label_B = torch.tensor([2, 0, CLASSES, 0, 1])
    order_T = region_scan(GRID, REGIONS) if method == "par" else scan("raster", GRID)
    order_BS = mixed_order(order_T, BATCH, float(model.any_order), generator)
    reference = importlib.import_module(REFERENCES.get(method, f"reference_{method}"))
    more = {
        "gpt": (HEADS, GRID),
        "randar": (order_BS, HEADS, GRID),
        "rar": (order_BS, HEADS),
        "arpg": (order_BS, HEADS, CLASSES),
        "par": (HEADS, REGIONS),
    }
    wide = {name: value.double() for name, value in weights.items()}
    expected_BSV = reference.reference_logits(wide, codes_BT, label_B, *more[method])
    logits_BSV = model(codes_BT, label_B, order_BS)
    assert logits_BSV.std() > 0.1
    torch.testing.assert_close(logits_BSV, expected_BSV, rtol=0, atol=1e-9)


def found_in(weights: dict, path) -> Published:
    return Published(path, weights, {name: name for name in weights}, [], None)


ONLY_SIGN = {"pos_instruct_embeddings", "spe_tok_embeddings.special_embeddings.weight"}
"""without its one tensor of its own a RandAR or PAR file is a LlamaGen file"""
LABELS = {"arpg": {"embeddings.weight", "head.weight"}, "rar": {"embeddings.weight"}}
"""tables in which a row more means a class more or fewer, so that no other shape contradicts it"""


def test_a_missing_a_foreign_and_a_misshapen_tensor_are_refused_whichever_it_is(method, tmp_path):
    weights = draw(layout(method, layers=2 if method == "arpg" else 1))
    labels = LABELS.get(method, {"cls_embedding.embedding_table.weight"})
    for name, value in weights.items():
        less = {key: kept for key, kept in weights.items() if key != name}
        if name not in ONLY_SIGN:
            with pytest.raises(InputError, match=name):
                restore(found_in(less, tmp_path), HEADS, GRID)
        misshapen = {"another dimension": value.unsqueeze(-1)}
        if name not in labels:
            misshapen["a row more"] = torch.cat((value, value[:1]))
        for other in misshapen.values():
            with pytest.raises(InputError):
                restore(found_in(weights | {name: other}, tmp_path), HEADS, GRID)
    with pytest.raises(InputError, match="unexpected: layers.9.odd"):
        restore(found_in(weights | {"layers.9.odd": torch.ones(1)}, tmp_path), HEADS, GRID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.ffn_norm.weight"), "missing: layers.1.ffn_norm.weight"),
        (lambda w: w.update(odd=torch.ones(1)), "unexpected: odd"),
        (
            lambda w: w.update({"norm.weight": torch.ones(17)}),
            r"wrong: norm.weight is torch.float32 \(17,\), expected \(16,\)",
        ),
        (lambda w: w.update({"norm.weight": w["norm.weight"].to(torch.int8)}), "torch.int8"),
        (lambda w: w.update({"module.norm.weight": torch.ones(16)}), "norm.weight twice"),
        (lambda w: w.update(epoch=3), "expected a tensor as epoch, found int"),
        (lambda w: w.clear(), "no model weights, only: nothing"),
        (lambda w: w.update({"encoder.down.0.x": torch.ones(1)}), "MaskGIT-VQGAN"),
        (lambda w: w.update({"cls_embedding.cap_proj.x": torch.ones(1)}), "text-to-image"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(change, message, tmp_path):
    weights = draw(layout("gpt"))
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(SystemExit, match=message) as refused, one_line_errors():
        imported(tmp_path / "w.pt", tmp_path)
    assert str(refused.value).count("\n") == 0 and len(str(refused.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


PUBLISHED = [
    ("gpt", (12, 768, 2048, 16384, 1000), {}, 12, 110_888_448),
    ("randar", (24, 1024, 2816, 16384, 1000), {}, 16, 342_912_000),
    ("randar", (24, 1024, 2816, 1024, 1000), {}, 16, 311_454_720),
    ("gpt", (24, 3200, 8704, 16384, 1000), {}, 32, 3_096_659_200),
    ("rar", (24, 768, 3072, 1024, 1000), {"heads": 16, "tokens": 256}, 16, 260_923_648),
    ("rar", (24, 1024, 4096, 1024, 1000), {"heads": 16, "tokens": 256}, 16, 461_668_352),
    ("rar", (32, 1280, 5120, 1024, 1000), {"heads": 16, "tokens": 256}, 16, 955_425_024),
    ("rar", (40, 1408, 6144, 1024, 1000), {"heads": 16, "tokens": 256}, 16, 1_498_520_704),
    ("arpg", (24, 1024, 2816, 16384, 1000), {}, 16, 319_845_376),
    ("arpg", (36, 1280, 3584, 16384, 1000), {}, 20, 718_997_760),
    ("par", (12, 768, 2048, 16384, 1000), {"regions": 4}, 12, 110_890_752),
    ("par", (36, 1280, 3584, 16384, 1000), {"regions": 16}, 20, 774_718_720),
    ("par", (36, 1280, 3584, 16384, 1000), {"regions": 4}, 20, 774_703_360),
    ("par", (24, 3200, 8704, 16384, 1000), {"regions": 16}, 32, None),
    ("randar", (6, 352, 1024, 512, 10), {}, 8, None),  # the CIFAR-10 baseline
]


LISTS = {  # method, width and codes -> tensors, and a hash of the sorted lines `name <tab> 1x2x3`
    ("gpt", 768, 16384): (88, "9fad22ac16afe7630de8dbfb03fb2f7f"),  # llamagen_b
    ("randar", 1024, 16384): (173, "0236692edec8b5a94d938a2b8fda6ff0"),  # randar_l_llamagen
    ("randar", 1024, 1024): (173, "b70ff661eca465047d96d8c061fcd270"),  # randar_l_maskgit
    ("rar", 768, 1024): (441, "fe1311f0e1b237ea8ff7028af31aa324"),  # rar_b
    ("arpg", 1024, 16384): (198, "c8f2518c1c3a416c2e676a504c8e44c6"),  # arpg_l
    "vq16": (344, "4ddc1fdb11a70354a610274ceb616102"),
}


def digest(shapes: dict) -> tuple[int, str]:
    lines = [f"{name}\t{'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    return len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


def test_layouts_are_the_listed_ones():
    layouts = {
        (name, size[1], size[3]): LAYOUTS[name](*size, **more) for name, size, more, *_ in PUBLISHED
    }
    layouts["vq16"] = vq16()
    assert {name: digest(layouts[name]) for name in LISTS} == LISTS


@pytest.mark.parametrize(("method", "sizes", "more", "heads", "total"), PUBLISHED)
def test_the_published_sizes_are_told_by_their_shapes(method, sizes, more, heads, total):
    shapes = LAYOUTS[method](*sizes, **more)
    assert recognise(shapes) == method
    config = infer_config(method, shapes, None, None)
    found = (config.layers, config.width, config.vocab_size, config.classes)
    assert found == (*sizes[:2], *sizes[3:])
    assert (config.heads, config.grid) == (heads, 16)
    assert config.regions == more.get("regions", 4)
    with torch.device("meta"):
        model = build(method, config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert total is None or parameters(model) == total


def test_what_the_user_says_must_agree_with_the_shapes():
    rar = layout("rar")
    assert infer_config("rar", rar, None, None).heads == HEADS
    with pytest.raises(InputError, match="have heads 2, got --heads 4"):
        infer_config("rar", rar, 4, None)
    with pytest.raises(InputError, match="have grid 4, got --grid 16"):
        infer_config("rar", rar, None, 16)
    with pytest.raises(InputError, match="width 16 is of no published size: give --heads"):
        infer_config("gpt", layout("gpt"), None, None)


def test_a_dry_run_tells_everything_and_writes_nothing(tmp_path, capsys):
    weights = draw(layout("arpg"))
    torch.save({"model": prefixed(weights, "_orig_mod.") | stray()}, tmp_path / "w.pt")
    assert imported(tmp_path / "w.pt", tmp_path, dry_run=True) is None
    said = capsys.readouterr().out
    assert "_orig_mod.layers.to_k.weight -> layers.to_k.weight (16, 16)" in said
    assert said.count(" -> ") == len(weights) + len(stray())
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_a_checkpoint_of_ours_is_not_imported(tmp_path):
    torch.save(draw(layout("gpt")), tmp_path / "w.pth")
    with pytest.raises(InputError, match="of this repo already"):
        tool.main(tool.ImportConfig(imported(tmp_path / "w.pth", tmp_path), tmp_path / "b.pth"))


def test_labels_get_their_names(tmp_path):
    assert tool.class_names(None, 10) == ("cifar10", list(tool.CLASSES["cifar10"]))
    assert tool.class_names(None, 1000)[0] == "imagenet"
    assert tool.class_names("mine", 2) == ("mine", ["class 0", "class 1"])
    with pytest.raises(InputError, match="cifar10 has 10 classes, the weights have 1000"):
        tool.class_names("cifar10", 1000)


def test_an_imported_generator_says_how_it_is_sampled(method, world, tmp_path, monkeypatch):
    weights = draw(layout(method, codes=32, classes=10, grid=8, layers=2))
    torch.save(trained(weights), tmp_path / "published.pt")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    named = {"out": None, "grid": 8, "tokenizer": world.tokenizer, "dataset": "shapes"}
    ours = imported(tmp_path / "published.pt", tmp_path, **named)
    assert ours == tmp_path / "checkpoints/runs/published_imported.pth"
    found = load_generator(ours)
    order = {"gpt": "raster", "rar": "anneal", "par": "regions"}.get(method, "random")
    assert found.header["config"].items() >= {"order": order, "steps": 1234}.items()
    assert (found.header["method"], found.order) == (method, order.replace("anneal", "raster"))


def test_a_generator_and_its_tokenizer_must_fit(world, tmp_path):
    torch.save(draw(layout("gpt", codes=32, classes=10, grid=8)), tmp_path / "w.pt")
    alone = imported(tmp_path / "w.pt", tmp_path, grid=8)
    with pytest.raises(InputError, match="imported without a tokenizer.*again with --tokenizer"):
        stage.main(eval_config(world, alone, tmp_path / "out"))
    for codes, grid in ((32, 4), (31, 8)):
        torch.save(draw(layout("gpt", codes=codes, classes=10)), tmp_path / "w.pt")
        with pytest.raises(InputError, match=f"the generator {codes} on a grid of {grid}"):
            imported(tmp_path / "w.pt", tmp_path, grid=grid, tokenizer=world.tokenizer)
