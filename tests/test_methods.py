"""The truths of the contract, over every method in METHODS: a new method gets them for free."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.command import InputError
from models.method import Method
from models.methods import METHODS, build
from models.orders import mixed_order, scan
from models.sampling import Plan, generate, pick, sample_codes
from models.training import parameters
from models.transformer import ModelConfig

CODES, GRID, BATCH = 7, 4, 3
TOKENS = GRID * GRID


def tiny(
    name: str, dropout: float = 0.0, grid: int = GRID, codes: int = CODES, scan: str | None = None
) -> Method:
    """A method in float64 with random weights, the head too: a zero head hides leaks."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=codes,
        classes=3,
        grid=grid,
        scan=scan or METHODS[name].scans[0],
        layers=2,
        heads=2,
        width=16,
        token_dropout=dropout,
        residual_dropout=dropout,
        ffn_dropout=dropout,
    )
    model = build(name, config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def orders_of(model: Method, batch: int, kinds=("raster", "random", "spiral_in")) -> list:
    """Orders to test a method in: a row of each kind it supports, `batch` rows."""
    tokens, grid = model.config.tokens, model.config.grid
    if not model.any_order:
        return [scan(model.config.scan, grid).expand(batch, tokens)]
    generator = torch.Generator().manual_seed(1)
    fixed = [scan(kind, grid).expand(batch, tokens) for kind in kinds if kind != "random"]
    return [*fixed, mixed_order(scan("raster", grid), batch, 1.0, generator)]


def order_of(model: Method) -> str:
    """The name of the most demanding order a method can be sampled in."""
    return "random" if model.any_order else model.config.scan


def draw(batch: int = BATCH, codes: int = CODES, tokens: int = TOKENS):
    generator = torch.Generator().manual_seed(2)
    codes_BT = torch.randint(codes, (batch, tokens), generator=generator)
    return codes_BT, torch.arange(batch) % 4  # 3 is the null label


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("training", [False, True])
def test_no_step_sees_its_own_or_a_later_code(name, training):
    model = tiny(name, dropout=0.3).train(training)
    codes_BT, label_B = draw()
    for order_BS in orders_of(model, BATCH):

        def logits(codes, order_BS=order_BS):
            torch.manual_seed(5)  # the same dropout every time
            return model(codes, label_B, order_BS)

        before_BSV = logits(codes_BT)
        for step in (0, 1, 7, TOKENS - 1):
            cell_B1 = order_BS[:, step : step + 1]
            changed_BT = codes_BT.scatter(1, cell_B1, (codes_BT.gather(1, cell_B1) + 1) % CODES)
            after_BSV = logits(changed_BT)
            assert torch.equal(before_BSV[:, : step + 1], after_BSV[:, : step + 1])
            if step + 1 < TOKENS:
                assert not torch.allclose(before_BSV[:, step + 1], after_BSV[:, step + 1])


def test_label_matters_from_the_first_step(name):
    model = tiny(name)
    codes_BT, _ = draw()
    order_BS = orders_of(model, BATCH)[0]
    one, other = (model(codes_BT, torch.full((BATCH,), k), order_BS) for k in (0, 1))
    assert not torch.allclose(one[:, 0], other[:, 0])


@pytest.mark.parametrize("known", [0, 1, 5])
def test_decoding_one_cell_at_a_time_is_teacher_forcing(name, known):
    model = tiny(name)
    codes_BT, label_B = draw()
    for order_BS in orders_of(model, BATCH):
        forced_BSV = model(codes_BT, label_B, order_BS)
        codes_BS = codes_BT.gather(1, order_BS)
        cache, cells = model.cache(label_B), order_BS.split([known, *[1] * (TOKENS - known)], dim=1)
        commits = codes_BS.split([known, *[1] * (TOKENS - known)], dim=1)
        for i in range(TOKENS - known):
            decoded_B1V = model.decode(cache, commits[i], cells[i], cells[i + 1])
            torch.testing.assert_close(
                decoded_B1V[:, 0], forced_BSV[:, known + i], rtol=0, atol=1e-10
            )


def test_groups_see_the_committed_codes_as_in_teacher_forcing(name):
    """The first cell of every group has the context of its step, however codes were grouped.

    In a method that chooses the groups by itself, all cells of a group have the context that they
    have in teacher forcing.
    """
    model = tiny(name)
    if not model.parallel:
        pytest.skip("decodes one cell at a time")
    codes_BT, label_B = draw()
    for order_BS in orders_of(model, BATCH):
        forced_BSV = model(codes_BT, label_B, order_BS)
        codes_BS, cache, at = codes_BT.gather(1, order_BS), model.cache(label_B), 0
        sizes = [1, 3, 2, 6, 4] if model.any_order else model.groups(None)
        cells = order_BS.split([0, *sizes], dim=1)
        commits = codes_BS.split([0, *sizes], dim=1)
        for i, size in enumerate(sizes):
            decoded_BnV = model.decode(cache, commits[i], cells[i], cells[i + 1])
            assert decoded_BnV.shape == (BATCH, size, CODES)
            same = 1 if model.any_order else size
            torch.testing.assert_close(
                decoded_BnV[:, :same], forced_BSV[:, at : at + same], rtol=0, atol=1e-10
            )
            at += size


def test_probabilities_of_all_grids_sum_to_one(name):
    model = tiny(name, grid=2, codes=3)
    grids_NT = torch.tensor(list(itertools.product(range(3), repeat=4)))
    orders = itertools.permutations(range(4)) if model.any_order else [scan(model.config.scan, 2)]
    for order in orders:
        order_NS = torch.tensor(list(order)).expand(len(grids_NT), 4)
        log_p = model(grids_NT, torch.zeros(len(grids_NT)).long(), order_NS).log_softmax(-1)
        chosen = log_p.gather(2, grids_NT.gather(1, order_NS).unsqueeze(2)).sum((1, 2))
        assert chosen.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_fixed_order_methods_refuse_other_orders(name):
    model = tiny(name)
    if model.any_order:
        pytest.skip("takes any order")
    codes_BT, label_B = draw()
    shuffled_BS = scan("raster", GRID).flip(0).expand(BATCH, TOKENS)
    with pytest.raises(ValueError, match="order"):
        model(codes_BT, label_B, shuffled_BS)
    with pytest.raises(ValueError, match="order"):
        uniform_BS = torch.zeros(BATCH, TOKENS)
        generate(model, label_B, shuffled_BS, uniform_BS, [1] * TOKENS, [1.0] * TOKENS)


def test_decoding_never_waits_for_the_device(name):
    """Under FakeTensorMode, where looking at a value is an error. Tables are made before."""
    model, (codes_BT, label_B) = tiny(name), draw()
    order_BS = orders_of(model, BATCH)[-1]
    model(codes_BT, label_B, order_BS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        codes_BT, label_B, order_BS = map(mode.from_tensor, (codes_BT, label_B, order_BS))
        cache = model.cache(label_B)
        codes_BS = codes_BT.gather(1, order_BS)
        for s in range(TOKENS):
            new = slice(max(s - 1, 0), s)
            logits_B1V = model.decode(cache, codes_BS[:, new], order_BS[:, new], order_BS[:, [s]])
            assert pick(logits_B1V, torch.rand(BATCH, 1), top_k=2, top_p=0.9).shape == (BATCH, 1)
            with pytest.raises(DataDependentOutputException):
                logits_B1V.sum().item()


def test_serial_methods_refuse_groups(name):
    model = tiny(name)
    if model.parallel:
        pytest.skip("decodes several cells at once")
    codes_BT, label_B = draw()
    order_BS = orders_of(model, BATCH)[0]
    with pytest.raises(ValueError, match="one"):
        model.decode(model.cache(label_B), codes_BT[:, :0], order_BS[:, :0], order_BS[:, :2])
    with pytest.raises(ValueError, match="one code a step"):
        generate(model, label_B, order_BS, torch.rand(BATCH, TOKENS), [1, 15], [1.0, 1.0])


FIRST_EXCESS = {"rar": (0.02**2 * 16 / 2, 0.03)}
"""nats above ln V and their tolerance, where the head does not start at zero: variance / 2"""


def test_first_loss_is_log_of_the_codebook(name):
    torch.manual_seed(0)
    model = build(
        name, ModelConfig(vocab_size=CODES, classes=3, grid=GRID, layers=2, width=16, heads=2)
    )
    codes_BT, label_B = draw()
    order_BS = orders_of(model, BATCH)[0]
    loss, parts = model.loss(model(codes_BT, label_B, order_BS), codes_BT, order_BS)
    excess, tolerance = FIRST_EXCESS.get(name, (0, 1e-6))
    assert loss.item() == pytest.approx(math.log(CODES) + excess, abs=tolerance)
    assert parts["nats"].item() == pytest.approx(math.log(CODES) + excess, abs=tolerance)


def test_one_batch_is_memorised(name):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=32, classes=3, grid=GRID, layers=2, width=32, heads=2)
    model = build(name, config).train()
    codes_BT, label_B = draw(codes=32)
    order_BS = orders_of(model, BATCH)[-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss, _ = model.loss(model(codes_BT, label_B, order_BS), codes_BT, order_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.loss(model(codes_BT, label_B, order_BS), codes_BT, order_BS)[0] < 0.1


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_sample_is_the_same_whatever_batch_it_is_in(name, cfg):
    model = tiny(name)
    label_N = torch.tensor([0, 1, 2, 0, 1])
    plan = Plan(order=order_of(model), cfg_scale=cfg)
    together = sample_codes(model, label_N, plan, seed=3)
    apart = [sample_codes(model, label_N[i : i + 1], plan, 3, first=i) for i in range(5)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together, sample_codes(model, label_N, plan, seed=4))
    assert not torch.equal(together[0], together[3])  # one class, two streams


@pytest.mark.parametrize("steps", range(1, TOKENS + 1))
def test_every_cell_is_written_for_every_number_of_steps(name, steps):
    model = tiny(name)
    try:
        model.groups(steps)
    except InputError:
        assert not (model.parallel and model.any_order)
        pytest.skip("has no such number of steps")
    plan = Plan(order=order_of(model), decode_steps=steps, cfg_scale=2.0)
    codes_NT = sample_codes(model, torch.tensor([0, 2]), plan, seed=0)
    assert codes_NT.shape == (2, TOKENS)
    assert codes_NT.min() >= 0 and codes_NT.max() < CODES


def test_sampling_follows_the_likelihood(name):
    """Frequencies of sampled grids agree with the exact probabilities (2x2 cells, 2 codes)."""
    model = tiny(name, grid=2, codes=2)
    count = 20_000
    order = order_of(model)
    codes_NT = sample_codes(model, torch.zeros(count).long(), Plan(order=order), seed=0)
    weights_T = torch.tensor([8, 4, 2, 1])
    frequency = torch.bincount((codes_NT * weights_T).sum(1), minlength=16) / count
    grids_NT = torch.tensor(list(itertools.product(range(2), repeat=4)))
    orders = list(itertools.permutations(range(4))) if model.any_order else [scan(order, 2)]
    p = torch.zeros(16, dtype=torch.float64)
    for each in orders:
        order_NS = torch.tensor(list(each)).expand(16, 4)
        log_p = model(grids_NT, torch.zeros(16).long(), order_NS).log_softmax(-1)
        chosen = log_p.gather(2, grids_NT.gather(1, order_NS).unsqueeze(2)).sum((1, 2))
        p += chosen.exp() / len(orders)
    error = (p * (1 - p) / count).sqrt()
    assert ((frequency - p).abs() < 5 * error + 1e-4).all()


def expected_keys(extra: dict, layers: int, width: int, hidden: int, codes: int) -> dict:
    """LlamaGen's state dict, from its documented layout."""
    keys = dict(extra)
    keys["cls_embedding.embedding_table.weight"] = (1001, width)
    keys["tok_embeddings.weight"] = keys["output.weight"] = (codes, width)
    keys["norm.weight"] = (width,)
    for i in range(layers):
        keys[f"layers.{i}.attention.wqkv.weight"] = (3 * width, width)
        keys[f"layers.{i}.attention.wo.weight"] = (width, width)
        keys[f"layers.{i}.feed_forward.w1.weight"] = (hidden, width)
        keys[f"layers.{i}.feed_forward.w3.weight"] = (hidden, width)
        keys[f"layers.{i}.feed_forward.w2.weight"] = (width, hidden)
        keys[f"layers.{i}.attention_norm.weight"] = (width,)
        keys[f"layers.{i}.ffn_norm.weight"] = (width,)
    return keys


@pytest.mark.parametrize(
    ("name", "extra", "layers", "heads", "width", "hidden", "codes", "total"),
    [
        ("gpt", {}, 12, 12, 768, 2048, 16384, 110_888_448),
        ("randar", {"pos_instruct_embeddings": (1, 1024)}, 24, 16, 1024, 2816, 16384, 342_912_000),
        ("randar", {"pos_instruct_embeddings": (1, 1024)}, 24, 16, 1024, 2816, 1024, 311_454_720),
    ],
)
def test_published_sizes_and_keys(name, extra, layers, heads, width, hidden, codes, total):
    """LlamaGen-B, RandAR-L with LlamaGen's tokenizer, RandAR-L with MaskGIT's."""
    with torch.device("meta"):
        model = build(
            name,
            ModelConfig(
                vocab_size=codes, classes=1000, grid=16, layers=layers, heads=heads, width=width
            ),
        )
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == expected_keys(extra, layers, width, hidden, codes)
    assert parameters(model) == total
