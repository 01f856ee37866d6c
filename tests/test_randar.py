"""RandAR: cells that are asked for together."""

import torch
from helpers import draw, tiny
from reference_llamagen import CLASS, rope, transformer


def test_each_cell_of_a_group_is_told_by_its_own_instruction():
    """The sequence is [c, p_1, x_1, .. p_m, x_m, p_a, p_b, ..], by the formulas."""
    model = tiny("randar")
    codes_BT, label_B, order_BS = draw(model)
    known_Bm, asked_Bn = order_BS[:, :5], order_BS[:, 5:9]
    given = codes_BT.gather(1, known_Bm), known_Bm, asked_Bn
    found_BnV = model.decode(model.cache(label_B), *given)
    w = {name: value.detach() for name, value in model.named_parameters()}
    vector_HK = w["pos_instruct_embeddings"].view(2, -1)
    for b, label in enumerate(label_B.tolist()):
        slots, cells = [w["cls_embedding.embedding_table.weight"][label]], [CLASS]
        for step, cell in enumerate(order_BS[b, :9].tolist()):
            code_D = w["tok_embeddings.weight"][codes_BT[b, cell]]
            slots += [rope(vector_HK, cell, 4).flatten(), code_D][: 2 if step < 5 else 1]
            cells += [cell] * (2 if step < 5 else 1)
        expected_nV = transformer(torch.stack(slots), w, cells, 2, 4)[-4:]
        torch.testing.assert_close(found_BnV[b], expected_nV, rtol=0, atol=1e-9)
