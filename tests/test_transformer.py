"""What the shared stack computes in its own way on a CPU is what PyTorch computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.transformer import FEW, Dropout, LayerCache, RMSNorm, attend


def test_the_norm_and_its_gradient_are_those_of_pytorch():
    torch.manual_seed(0)
    x_BSD = torch.randn(3, 5, 12, dtype=torch.float64)
    norm = RMSNorm(12).double()
    nn.init.normal_(norm.weight)
    found, expected = ((x_BSD * 3).requires_grad_() for _ in range(2))
    grad_BSD = torch.randn_like(x_BSD).transpose(0, 1).contiguous().transpose(0, 1)
    norm(found).backward(grad_BSD)
    weight_D = norm.weight.detach().requires_grad_()
    F.rms_norm(expected, (12,), weight_D, eps=1e-5).backward(grad_BSD)
    torch.testing.assert_close(norm(found), F.rms_norm(expected, (12,), weight_D, eps=1e-5))
    torch.testing.assert_close(found.grad, expected.grad)
    torch.testing.assert_close(norm.weight.grad, weight_D.grad)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(101, 999, dtype=dtype, requires_grad=True)
    dropped = Dropout(p)(x)
    assert dropped.dtype == dtype
    kept = dropped != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 5e-3
    if p < 1:
        torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)))
        assert not torch.equal(kept, Dropout(p)(x) != 0) or p == 0  # another draw each time
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())
    assert torch.equal(Dropout(p).eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, FEW, FEW + 1])
def test_attention_over_a_cache_with_room_sees_what_is_written(dtype, queries):
    """The last queries of 20 slots of 32; and as many that see all 20."""
    torch.manual_seed(0)
    q_BHSK, k_BHLK, v_BHLK = torch.randn(3, 2, 3, 20, 8, dtype=torch.float64)
    cache = LayerCache(32)
    cache.write(0, k_BHLK[:, :, :4].to(dtype), v_BHLK[:, :, :4].to(dtype))
    kv = cache.write(4, k_BHLK[:, :, 4:].to(dtype), v_BHLK[:, :, 4:].to(dtype))
    q_BHSK = q_BHSK[:, :, -queries:]
    causal_SL = torch.ones(20, 20, dtype=torch.bool).tril()[-queries:]
    all_SL = torch.ones(queries, 20, dtype=torch.bool)
    for slots, seen_SL in ((range(20 - queries, 20), causal_SL), (range(19, 20), all_SL)):
        expected = F.scaled_dot_product_attention(q_BHSK, k_BHLK, v_BHLK, seen_SL)
        expected = expected.transpose(1, 2).flatten(2)
        for given_SL in (None, seen_SL):
            found = attend(q_BHSK.to(dtype), *kv, slots, given_SL)
            assert found.dtype == dtype
            atol = 3e-2 if dtype == torch.bfloat16 else 1e-12
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)
