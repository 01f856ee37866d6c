"""RAR against its published layout, its formulas, and what its two position tables must do."""

import math

import pytest
import torch
from reference_rar import reference_logits

from models.methods import build
from models.orders import mixed_order, scan
from models.rar import RAR
from models.training import parameters
from models.transformer import ModelConfig

CODES, GRID, BATCH = 5, 4, 3
TOKENS = GRID * GRID


def tiny(**more) -> RAR:
    """A RAR in float64 with random weights everywhere: zero gates and a zero T hide mistakes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": CODES, "classes": 3, "grid": GRID, "layers": 2, "heads": 2, "width": 16}
    model = build("rar", ModelConfig(**sizes, **more)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes_BT, label_B with a null label and a repeated one, random order_BS."""
    generator = torch.Generator().manual_seed(seed)
    codes_BT = torch.randint(CODES, (BATCH, TOKENS), generator=generator)
    order_BS = mixed_order(scan("raster", GRID), BATCH, 1.0, generator)
    return codes_BT, torch.tensor([3, 1, 3]), order_BS


def published_keys(
    width: int, layers: int, heads: int, hidden: int, tokens: int, codes: int, classes: int
) -> dict[str, tuple[int, ...]]:
    """RAR's state dict, from its documented layout, in its order."""
    keys = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens + 1024, width),
        "target_aware_pos_embed": (1, tokens + 1024, width),
        "timesteps_embeddings": (1, tokens + 100, width),
    }

    def layer(name: str, *shape: int) -> None:
        keys[f"{name}.weight"] = shape
        keys[f"{name}.bias"] = shape[:1]

    for i in range(layers):
        layer(f"blocks.{i}.norm1", width)
        layer(f"blocks.{i}.attn.qkv", 3 * width, width)
        layer(f"blocks.{i}.attn.q_norm", width // heads)
        layer(f"blocks.{i}.attn.k_norm", width // heads)
        layer(f"blocks.{i}.attn.proj", width, width)
        layer(f"blocks.{i}.norm2", width)
        layer(f"blocks.{i}.mlp.fc1", hidden, width)
        layer(f"blocks.{i}.mlp.fc2", width, hidden)
        layer(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    keys["embeddings.weight"] = (codes + 1 + classes + 1, width)
    layer("adaln_before_head.adaLN_modulation.1", 2 * width, width)
    layer("lm_head", codes, width)
    return keys


@pytest.mark.parametrize(
    ("width", "layers", "hidden", "total"),
    [
        (768, 24, None, 260_923_648),
        (1024, 24, None, 461_668_352),
        (1280, 32, None, 955_425_024),
        (1408, 40, 6144, 1_498_520_704),
    ],
    ids=["B", "L", "XL", "XXL"],
)
def test_published_sizes_and_keys(width, layers, hidden, total):
    sizes = {"vocab_size": 1024, "classes": 1000, "grid": 16, "heads": 16}
    config = ModelConfig(width=width, layers=layers, ffn_width=hidden, spare_rows=True, **sizes)
    with torch.device("meta"):
        model = build("rar", config)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = published_keys(width, layers, 16, hidden or 4 * width, 256, 1024, 1000)
    assert list(found.items()) == list(expected.items())
    assert parameters(model) == total


@pytest.mark.parametrize("ffn_width", [None, 24])
def test_logits_are_those_of_the_formulas(ffn_width):
    model = tiny(spare_rows=True, ffn_width=ffn_width)
    shapes = published_keys(16, 2, 2, ffn_width or 64, TOKENS, CODES, 3)
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for key, shape in shapes.items()
    }
    model.load_state_dict(weights)
    codes_BT, label_B, order_BS = draw()
    found_BSV = model(codes_BT, label_B, order_BS)
    expected_BSV = reference_logits(weights, codes_BT, label_B, order_BS, heads=2)
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-9)


def test_spare_rows_change_nothing():
    spare, short = tiny(spare_rows=True), tiny()
    rows = {key: value.shape for key, value in short.state_dict().items()}
    weights = {
        key: value[:, : rows[key][1]] if value.ndim == 3 else value
        for key, value in spare.state_dict().items()
    }
    short.load_state_dict(weights)
    assert torch.equal(short(*draw()), spare(*draw()))


@pytest.mark.parametrize("known", [0, 1, 7, TOKENS - 1])
def test_decoding_is_teacher_forcing_in_random_orders(known):
    model = tiny()
    codes_BT, label_B, order_BS = draw(known)
    forced_BSV = model(codes_BT, label_B, order_BS)
    cells = order_BS.split([known, *[1] * (TOKENS - known)], dim=1)
    cache = model.cache(label_B)
    for i in range(TOKENS - known):
        decoded_B1V = model.decode(cache, codes_BT.gather(1, cells[i]), cells[i], cells[i + 1])
        torch.testing.assert_close(decoded_B1V[:, 0], forced_BSV[:, known + i], rtol=0, atol=1e-10)


def test_a_question_can_be_dropped():
    """Asking about a cell and then committing others leaves no trace of the question."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    forced_BSV = model(codes_BT, label_B, order_BS)
    codes_BS, none_B0 = codes_BT.gather(1, order_BS), order_BS[:, :0]
    cache = model.cache(label_B)

    def ask(known: int, after: int, asked: int) -> torch.Tensor:
        """Commit the cells known..after, then ask for one."""
        return model.decode(
            cache,
            codes_BS[:, known:after],
            order_BS[:, known:after],
            order_BS[:, asked : asked + 1],
        )[:, 0]

    for known, after in ((0, 0), (0, 2), (2, 3), (3, 9)):
        ask(known, after, 15)
        for asked in (14, after):
            asked_B1 = order_BS[:, asked : asked + 1]
            found_BV = model.decode(cache, none_B0, none_B0, asked_B1)[:, 0]
        torch.testing.assert_close(found_BV, forced_BSV[:, after], rtol=0, atol=1e-10)
        ask(after, after, 13)  # the next commit is not of the cell asked for last


def test_in_raster_order_the_target_table_folds_into_the_positions():
    model, folded = tiny(), tiny()
    with torch.no_grad():
        target = model.target_aware_pos_embed
        folded.pos_embed[0, 1 : TOKENS + 1] += target[0, 2 : TOKENS + 2]
        folded.target_aware_pos_embed.zero_()
    codes_BT, label_B, order_BS = draw()
    raster_BS = scan("raster", GRID).expand(BATCH, TOKENS)
    expected_BSV = model(codes_BT, label_B, raster_BS)
    found_BSV = folded(codes_BT, label_B, raster_BS)
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-12)
    assert not torch.allclose(
        folded(codes_BT, label_B, order_BS), model(codes_BT, label_B, order_BS)
    )


@pytest.mark.parametrize("step", [0, 5, TOKENS - 2])
def test_the_next_cell_is_told_by_the_target_table_alone(step):
    """Exchanging the cell of `step` with a later one changes the logits from `step` on."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    swapped_BS = order_BS.clone()
    swapped_BS[:, [step, TOKENS - 1]] = order_BS[:, [TOKENS - 1, step]]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return model(codes_BT, label_B, order_BS), model(codes_BT, label_B, swapped_BS)

    before_BSV, after_BSV = both()
    assert torch.equal(before_BSV[:, :step], after_BSV[:, :step])
    changed_BV = (before_BSV[:, step] - after_BSV[:, step]).abs()
    assert (changed_BV.amax(dim=1) > 1e-3).all()
    torch.nn.init.zeros_(model.target_aware_pos_embed)
    before_BSV, after_BSV = both()
    assert torch.equal(before_BSV[:, : step + 1], after_BSV[:, : step + 1])


@pytest.mark.parametrize("seen", [1, 8, 14])
def test_the_order_of_later_cells_does_not_reach_back(seen):
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    later_BS = torch.cat((order_BS[:, :seen], order_BS[:, seen:].flip(1)), dim=1)
    before_BSV = model(codes_BT, label_B, order_BS)
    after_BSV = model(codes_BT, label_B, later_BS)
    assert torch.equal(before_BSV[:, :seen], after_BSV[:, :seen])
    assert not torch.allclose(before_BSV[:, seen], after_BSV[:, seen])


def test_images_of_a_label_share_their_modulation_and_nothing_else():
    """Labels repeated and out of order in a batch give what each image gives alone."""
    model = tiny()
    codes_BT, label_B, order_BS = draw()
    together_BSV = model(codes_BT, label_B, order_BS)
    for i in range(BATCH):
        alone_BSV = model(*(x[i : i + 1] for x in (codes_BT, label_B, order_BS)))
        torch.testing.assert_close(alone_BSV[0], together_BSV[i], rtol=0, atol=1e-12)


def test_initial_weights():
    """Blocks are the identity; ln sum exp - mean of the logits is ln V + 0.02^2 * D / 2."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=512, classes=3, grid=GRID, layers=2, heads=4, width=256)
    model = build("rar", config).eval()
    assert model.cls_token.count_nonzero() == 0
    zero = [name for name, value in model.named_parameters() if not value.any()]
    assert all(f"blocks.{i}.adaLN_modulation.1.weight" in zero for i in range(2))
    assert "adaln_before_head.adaLN_modulation.1.weight" in zero
    for name, value in model.named_parameters():
        if value.ndim > 1 and name not in [*zero, "cls_token"]:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
    _, label_B, order_BS = draw()
    codes_BT = torch.randint(512, (BATCH, TOKENS))
    logits_BSV = model(codes_BT, label_B, order_BS)
    excess = (logits_BSV.logsumexp(-1) - logits_BSV.mean(-1)).mean().item() - math.log(512)
    assert excess == pytest.approx(0.02**2 * 256 / 2, rel=0.1)
    loss, _ = model.loss(logits_BSV, codes_BT, order_BS)
    assert loss.item() == pytest.approx(math.log(512) + 0.02**2 * 256 / 2, abs=0.2)


def test_logits_are_fp32_under_bf16():
    model, (codes_BT, label_B, order_BS) = tiny().float(), draw()
    exact_BSV = model(codes_BT, label_B, order_BS)
    none_B0, next_B1 = order_BS[:, :0], order_BS[:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        found_BSV = model(codes_BT, label_B, order_BS)
        decoded_B1V = model.decode(model.cache(label_B), none_B0, none_B0, next_B1)
    assert found_BSV.dtype == decoded_B1V.dtype == torch.float32
    assert (found_BSV - exact_BSV).abs().max() < 0.1 * exact_BSV.abs().max()
