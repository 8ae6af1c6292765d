"""attention and attention_varlen: every road against the plain formula, masks, scale, dropout, packing."""

import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("road", ["sdpa", "math", "flash_attn", "xformers"])
@pytest.mark.parametrize(("queries", "keys", "heads", "width"), [(7, 7, 2, 16), (1, 9, 3, 32), (33, 5, 1, 64)])
def test_attention_roads(road, queries, keys, heads, width) -> None:
    library = road in ("flash_attn", "xformers")
    dtype = torch.bfloat16 if library else torch.float32
    tensors = [torch.randn(2, n, heads, width, device=DEVICE).to(dtype) for n in (queries, keys, keys)]
    if library:
        try:
            kernels.attention(*tensors, road=road)
        except ValueError as error:
            pytest.skip(str(error))
    results = {}
    for name, kind in ((road, dtype), ("math", dtype), ("truth", torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
        out = kernels.attention(*leaves, road="math" if name == "truth" else name)
        results["ours" if name == road and "ours" not in results else name] = (
            out.detach(),
            *torch.autograd.grad(out.square().sum(), leaves),
        )
    results.setdefault("math", results["ours"])
    for ours, reference, truth in zip(results["ours"], results["math"], results["truth"], strict=True):
        assert (ours.double() - truth).abs().max() <= 2 * (reference.double() - truth).abs().max() + 1e-5


def test_the_chosen_road_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    q = torch.randn(1, 2, 1, 8, device=DEVICE, dtype=torch.float64)
    with caplog.at_level("INFO", logger="kernels"):
        for _ in range(3):
            kernels.attention(q, q, q)
    said = [record.message for record in caplog.records if "float64" in record.message]
    assert said == [f"attention on {DEVICE} in float64 takes the road sdpa"]


@pytest.mark.parametrize("road", ["sdpa", "math"])
def test_masked_keys_are_not_there(road: str) -> None:
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE) for n in (3, 5, 5))
    mask = torch.tensor([[True, True, False, True, False], [True] * 5], device=DEVICE)
    ours = kernels.attention(q, k, v, key_mask=mask, road=road)
    torch.testing.assert_close(ours[:1], kernels.attention(q[:1], k[:1, mask[0]], v[:1, mask[0]], road="math"))
    torch.testing.assert_close(ours[1:], kernels.attention(q[1:], k[1:], v[1:], road="math"))
    torch.testing.assert_close(kernels.attention(q, k, v, key_mask=mask), ours)
    with pytest.raises(ValueError, match="must be bool"):
        kernels.attention(q, k, v, key_mask=mask.int())
    with pytest.raises(ValueError, match="no dropout"):
        kernels.attention(q, k, v, dropout=0.1, road="math")


@pytest.mark.parametrize("road", ["sdpa", "math"])
def test_attention_scale_is_the_one_given(road: str) -> None:
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (3, 5, 5))
    by_hand = torch.einsum("bqhd,bkhd->bhqk", q, 0.7 * k).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", by_hand, v)
    torch.testing.assert_close(kernels.attention(q, k, v, scale=0.7, road=road), expected)
    ends = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (3, 5))
    packed = kernels.attention_varlen(q[0], k[0], v[0], *ends, 3, 5, scale=0.7, road=road)
    torch.testing.assert_close(packed, expected[0])


def test_attention_dropout_drops_and_scales() -> None:
    """Over ones the output is the sum of the weights kept, divided by the probability of keeping one: 1 on average."""
    q = torch.randn(1, 400, 4, 16, device=DEVICE)
    sums = kernels.attention(q, q, torch.ones_like(q), dropout=0.5)[..., 0]
    assert sums.std() > 0.02 and abs(sums.mean() - 1) < 0.05


@pytest.mark.parametrize("road", ["sdpa", "math"])
def test_packed_attention_keeps_sequences_apart(road: str) -> None:
    lengths_q, lengths_k = [3, 1, 5], [2, 4, 1]
    packed_q, packed_k, packed_v = (
        torch.randn(sum(n), 2, 16, device=DEVICE) for n in (lengths_q, lengths_k, lengths_k)
    )
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
        for n in (lengths_q, lengths_k)
    )
    ours = kernels.attention_varlen(packed_q, packed_k, packed_v, cu_q, cu_k, 5, 4, road=road)
    parts = zip(packed_q.split(lengths_q), packed_k.split(lengths_k), packed_v.split(lengths_k), strict=True)
    alone = torch.cat([kernels.attention(q[None], k[None], v[None], road="math")[0] for q, k, v in parts])
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
