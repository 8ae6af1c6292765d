"""Attention on every backend that is there, whole and packed, against float64."""

import pytest
import torch
from torch import Tensor

import kernels
from tests.kernels.truth import assert_as_good_as_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", ["sdpa", "math", "flash_attn", "xformers"])
@pytest.mark.parametrize(("queries", "keys", "heads", "width"), [(7, 7, 2, 16), (1, 9, 3, 32), (33, 5, 1, 64)])
def test_attention_backends(backend, queries, keys, heads, width) -> None:
    library = backend in ("flash_attn", "xformers")
    dtype = torch.bfloat16 if library else torch.float32
    tensors = [torch.randn(2, n, heads, width, device=DEVICE).to(dtype) for n in (queries, keys, keys)]
    if library:
        try:
            kernels.attention(*tensors, backend=backend)
        except ValueError as error:
            pytest.skip(str(error))
    results = {}
    for name, kind in ((backend, dtype), ("math", dtype), ("truth", torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
        out = kernels.attention(*leaves, backend="math" if name == "truth" else name)
        results["ours" if name == backend and "ours" not in results else name] = (
            out.detach(),
            *torch.autograd.grad(out.square().sum(), leaves),
        )
    results.setdefault("math", results["ours"])
    for ours, reference, truth in zip(results["ours"], results["math"], results["truth"], strict=True):
        assert (ours.double() - truth).abs().max() <= 2 * (reference.double() - truth).abs().max() + 1e-5


def test_the_chosen_backend_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    q = torch.randn(1, 2, 1, 8, device=DEVICE, dtype=torch.float64)
    with caplog.at_level("INFO", logger="kernels"):
        for _ in range(3):
            kernels.attention(q, q, q)
    said = [record.message for record in caplog.records if "float64" in record.message]
    kernel = "math" if DEVICE == "cuda" else "flash"
    assert said == [f"attention on {DEVICE} in float64 takes the backend sdpa, PyTorch's kernel {kernel}"]


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_masked_keys_are_not_there(backend: str) -> None:
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE) for n in (3, 5, 5))
    mask = torch.tensor([[True, True, False, True, False], [True] * 5], device=DEVICE)
    ours = kernels.attention(q, k, v, key_mask=mask, backend=backend)
    torch.testing.assert_close(ours[:1], kernels.attention(q[:1], k[:1, mask[0]], v[:1, mask[0]], backend="math"))
    torch.testing.assert_close(ours[1:], kernels.attention(q[1:], k[1:], v[1:], backend="math"))
    torch.testing.assert_close(kernels.attention(q, k, v, key_mask=mask), ours)
    with pytest.raises(ValueError, match="must be bool"):
        kernels.attention(q, k, v, key_mask=mask.int())
    with pytest.raises(ValueError, match="no dropout"):
        kernels.attention(q, k, v, dropout=0.1, backend="math")
    with pytest.raises(ValueError, match="takes no mask"):
        kernels.attention(q, k, v, key_mask=mask, backend="flash")


def packed_totals(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", ["sdpa", "padded", "varlen", "flash_attn", "math"])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([3, 1, 5, 3, 1], [2, 4, 1, 2, 6]), ([1], [1]), ([4, 4, 2, 2, 2], [4, 4, 2, 2, 2])]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed_attention(backend, lengths_q, lengths_k, scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of uneven sequences, against each sequence alone in float64."""
    dtype = torch.bfloat16 if backend in ("varlen", "flash_attn") else torch.float32
    tensors = [torch.randn(sum(n), 2, 16, device=DEVICE).to(dtype) for n in (lengths_q, lengths_k, lengths_k)]
    upstream = torch.randn_like(tensors[0])
    places = (packed_totals(lengths_q), packed_totals(lengths_k), max(lengths_q), max(lengths_k))
    if backend == "padded":  # what sdpa does on a GPU, and in a compiled program
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def results(kind: torch.dtype, compute) -> tuple[Tensor, ...]:
        # Not contiguous: tokens interleaved, as in a fused projection.
        leaves = [tensor.to(kind).repeat_interleave(2, 0)[::2].requires_grad_() for tensor in tensors]
        out = compute(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind)))

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        return torch.cat([kernels.attention(*(x[None] for x in p), scale=scale, backend="math")[0] for p in parts])

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        name = "sdpa" if backend == "padded" else backend
        return kernels.attention_varlen(q, k, v, *places, scale=scale, backend=name)

    if backend in ("varlen", "flash_attn"):
        try:
            packed(*tensors)
        except ValueError as error:
            pytest.skip(str(error))
    for ours, reference, truth in zip(
        results(dtype, packed), results(dtype, alone), results(torch.float64, alone), strict=True
    ):
        assert_as_good_as_reference(ours, reference, truth)


@pytest.mark.compile
def test_packed_attention_compiles_without_reading_lengths() -> None:
    q = torch.randn(7, 2, 16, device=DEVICE, requires_grad=True)
    places = packed_totals([4, 1, 2])
    compute = lambda x: kernels.attention_varlen(x, x, x, places, places, 4, 4, backend="sdpa")  # noqa: E731
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), compute(q))


def test_the_varlen_backend_calls_torch_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone, on a GPU that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q = torch.empty_strided((9, 2, 16), (96, 16, 1), device="cuda:0", dtype=torch.bfloat16)
        places = torch.empty_strided((4,), (1,), device="cuda:0", dtype=torch.int32)
        out = kernels.attention_varlen(q, q, q, places, places, 5, 5, backend="varlen")
    assert out.shape == q.shape and out.dtype == q.dtype


def test_packed_attention_makes_no_map_over_all_tokens() -> None:
    """256 sequences of 16 tokens: a joint map would be 64 MB of floats, or 16 MB of mask."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    q = torch.randn(4096, 2, 16, device=DEVICE)
    places = packed_totals([16] * 256)
    for backend, allowed in (("sdpa", q.numel()), ("math", 4096**2)):
        with Largest() as seen:
            kernels.attention_varlen(q, q, q, places, places, 16, 16, backend=backend)
        assert seen.elements <= allowed if backend == "sdpa" else seen.elements >= allowed


def test_impossible_backends_of_packed_attention_are_refused() -> None:
    q = torch.randn(4, 2, 16)
    places = (torch.tensor([0, 4], dtype=torch.int32),) * 2
    with pytest.raises(ValueError, match="'varlen' is not possible: it needs CUDA tensors"):
        kernels.attention_varlen(q, q, q, *places, 4, 4, backend="varlen")
    with pytest.raises(ValueError, match="attention_varlen alone"):
        kernels.attention(q[None], q[None], q[None], backend="varlen")
    with pytest.raises(ValueError, match="no packed form"):
        kernels.attention_varlen(q, q, q, *places, 4, 4, backend="xformers")
    with pytest.raises(ValueError, match="max_seqlen_q is 3"):
        kernels.attention_varlen(q, q, q, *places, 3, 4)
    with pytest.raises(ValueError, match="must rise from 0 to total_k = 4"):
        kernels.attention_varlen(q, q, q, places[0], torch.tensor([0, 3], dtype=torch.int32), 4, 4)
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="float16 or bfloat16"):
            kernels.attention_varlen(q.cuda(), q.cuda(), q.cuda(), *(p.cuda() for p in places), 4, 4, backend="varlen")


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_attention_scale_is_the_one_given(backend: str) -> None:
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE) for n in (3, 5, 5))
    by_hand = torch.einsum("bqhd,bkhd->bhqk", q, 0.7 * k).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", by_hand, v)
    torch.testing.assert_close(kernels.attention(q, k, v, scale=0.7, backend=backend), expected)
    ends = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (3, 5))
    packed = kernels.attention_varlen(q[0], k[0], v[0], *ends, 3, 5, scale=0.7, backend=backend)
    torch.testing.assert_close(packed, expected[0])


def test_attention_dropout_drops_and_scales() -> None:
    """Over ones the output is the sum of the weights kept, divided by the probability of keeping one: 1 on average."""
    q = torch.randn(1, 400, 4, 16, device=DEVICE)
    sums = kernels.attention(q, q, torch.ones_like(q), dropout=0.5)[..., 0]
    assert sums.std() > 0.02 and abs(sums.mean() - 1) < 0.05


def test_a_library_that_does_not_import_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """kernels looks for flash-attn when it is imported itself: a build for another torch must not keep it from that."""
    from kernels.attention import _imports

    assert not _imports.__wrapped__("no_such_library") and not caplog.records

    def broken(name: str) -> None:
        raise AttributeError("module 'torch' has no attribute 'old'")

    monkeypatch.setattr("importlib.import_module", broken)
    assert not _imports.__wrapped__("flash_attn")
    (record,) = caplog.records
    assert "flash_attn is installed but does not import" in record.getMessage() and "'old'" in record.getMessage()
