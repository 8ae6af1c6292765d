"""What a step asks of a GPU: counted, beside counts by hand, the objective's own FLOPs, real gradients and allocations."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from benchmarks.counted import Counter, Counts, count
from benchmarks.fake_gpu import OLDEST_TORCH, TORCH, fake_gpu, run_backward
from umt_fast.bench.measure import random_video
from umt_fast.bench.stage1 import costs, fast_steps, stage1_config
from umt_fast.tasks.pretraining import UnmaskedAlignment

pytestmark = pytest.mark.skipif(
    TORCH < OLDEST_TORCH, reason=f"fake_gpu.py needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}; nothing else does"
)
CPU = torch.device("cpu")
HOPPER = (9, 0)


@pytest.fixture(scope="module")
def implementations() -> dict[str, Counts]:
    """The counts of a tiny step of two clips."""
    config = stage1_config("tiny", 2, "bf16")
    eight = stage1_config("tiny", 2, "bf16", "fp8")
    return {
        "fast": count(config, "fast", HOPPER),
        "plain": count(config, "plain", HOPPER),
        "fp8": count(eight, "fast", HOPPER),
    }


def names(counts: Counts, part: str) -> set[str]:
    return {operation.name.removesuffix(".default") for operation in counts.operations if operation.part == part}


def test_flops_are_those_of_the_objective(implementations: dict[str, Counts]) -> None:
    config = stage1_config("tiny", 2, "bf16")
    expected = 2 * UnmaskedAlignment.flops_of(config)
    counted = {name: sum(o.products + o.products8 for o in found.operations) for name, found in implementations.items()}
    # Attention's backward computes the logits once more, which the formula leaves out.
    assert expected < counted["fast"] < 1.02 * expected
    assert counted["fp8"] == counted["fast"] < counted["plain"]
    eight = sum(operation.products8 for operation in implementations["fp8"].operations)
    blocks, c, rows = config.teacher.depth - 1, config.teacher.width, 2 * 8 * 17
    assert eight == blocks * rows * 22 * c * c


def test_bytes_are_at_least_those_of_a_fused_step(implementations: dict[str, Counts]) -> None:
    trained = sum(p.numel() for p in UnmaskedAlignment(stage1_config("tiny", 2, "fp32")).student.parameters())
    fused = sum(cost.bytes for cost in costs(stage1_config("tiny", 2, "bf16"), trained).values())
    moved = {name: sum(operation.bytes for operation in found.operations) for name, found in implementations.items()}
    assert fused < moved["fast"] < 5 * fused and moved["fast"] < moved["plain"]


def test_implementations_branch_as_on_a_gpu(implementations: dict[str, Counts]) -> None:
    teacher = names(implementations["fast"], "teacher")
    assert {"patch_gather", "semantic_mask", "gather_norm", "token_gather"} <= teacher
    assert "_scaled_dot_product_flash_attention" in teacher and "native_layer_norm" not in teacher
    assert names(implementations["fast"], "optimizer") == {
        "_fused_adamw_",
        "_foreach_add_.Scalar",
        "_foreach_sub_.List",  # the step's number is taken back where a gradient was not finite
    }
    assert {"_foreach_addcdiv_.ScalarList", "_foreach_sqrt"} <= names(implementations["plain"], "optimizer")
    assert "_scaled_mm" in names(implementations["fp8"], "teacher")
    assert "align_loss_backward" in names(implementations["fast"], "backward")
    # Scores, two position tables, the loss, the step's end; and three boolean indices, one of them in the backward pass too.
    assert implementations["fast"].waits == implementations["fp8"].waits == 0 and implementations["plain"].waits == 9
    # The scores there (all of a frame's indices, of which the kept ones), the mask back, and both position tables.
    tokens, kept, width = 8 * 16, 8 * 4, 96
    assert (
        implementations["plain"].host_bytes == 2 * kept * 8 + 2 * tokens + tokens * width * 2 + 2 * tokens * width * 4
    )
    assert implementations["fast"].host_bytes == 0


# Of a B/16 step of 64 clips in bf16, as an H100 would run it. A change of the step shows here, and is then written down.
GIGABYTES = {"teacher": 69.779, "student": 25.274, "backward": 48.177, "optimizer": 2.464, "rest": 0.605}


def test_a_b16_step_of_64_clips_asks_for_so_much() -> None:
    found = count(stage1_config("b16", 64, "bf16"), "fast", HOPPER)
    moved = {part: sum(o.bytes for o in found.operations if o.part == part) / 1e9 for part in GIGABYTES}
    assert moved == pytest.approx(GIGABYTES, abs=5e-4)
    assert sum(operation.products for operation in found.operations) == pytest.approx(28.7056e12, rel=1e-5)
    assert len(found.operations) == 1112 and found.peak / 2**30 == pytest.approx(7.452, abs=1e-3)
    assert found.waits == 0 and found.host_bytes == 0, "the Trainer's own step never has the host wait"


def test_bytes_counted_by_hand() -> None:
    x, table = torch.zeros(6, 10), torch.zeros(100, 10)
    rows = torch.tensor([3, 5, 7])
    with Counter(CPU) as counter:
        expected = {}

        def step(name: str, operation: object, moved: int) -> None:
            operation()
            expected[name] = moved

        step("views", lambda: x.t()[2:].unsqueeze(0).expand(4, -1, -1), 0)
        step("allocation", lambda: torch.empty(1000), 0)
        step("elementwise", lambda: x + x.exp(), 4 * (60 * 2 + 60 * 3))
        step("broadcast is read once", lambda: x[:1].expand(6, 10).clone(), 4 * (10 + 60))
        step("in place", lambda: x.mul_(2), 4 * 120)
        step("overwritten", lambda: x.zero_(), 4 * 60)
        step("copied into", lambda: x.copy_(table[:6]), 4 * 120)
        step("picked rows alone", lambda: table[rows], 4 * 30 * 2 + 8 * 3)
        step("product", lambda: x @ table.t(), 4 * (60 + 1000 + 600))
        found = counter.finish().operations
    assert sum(operation.bytes for operation in found) == sum(expected.values()), (found, expected)
    assert sum(operation.products for operation in found) == 2 * 6 * 10 * 100


def test_kernels_read_visible_rows_alone() -> None:
    with fake_gpu(HOPPER) as device, Counter(device) as counter:
        x, weight = torch.empty(2, 50, 64, device=device, dtype=torch.bfloat16), torch.empty(64, device=device)
        visible = torch.empty(2, 7, dtype=torch.int32, device=device)
        video = torch.empty(2, 8, 64, 64, 3, dtype=torch.uint8, device=device)
        counter.restart()
        kernels.gather_norm(x, visible, weight, weight)
        kernels.token_gather(x, visible)
        kernels.patch_gather(video, visible, patch_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, dtype=torch.bfloat16)
        moved = [operation.bytes for operation in counter.finish().operations]
    rows, index = 2 * 7 * 64 * 2, 2 * 7 * 4
    assert moved == [2 * rows + index + 2 * 64 * 4, 2 * rows + index, 2 * 7 * 768 * (2 + 1) + index]


def test_memory_follows_real_allocations() -> None:
    with Counter(CPU) as counter:
        a = torch.zeros(1024, 256)  # 1 MiB
        b = a.view(512, 512) + 1
        assert counter.memory.held == 2 << 20
        c = torch.zeros(100)  # 400 bytes take 512
        del b
        assert counter.memory.held == (1 << 20) + 512 and counter.memory.peak == (2 << 20) + 512
        counter.restart()
        d = torch.cat([a, a])
        view = d[:1]
        del a, d
        assert counter.memory.held == (2 << 20) + 512 and counter.finish().peak == (3 << 20) + 512
        del c, view
    assert counter.memory.held == 0


def test_memory_of_saved_tensors_is_freed_during_backward() -> None:
    """A chain of n squares saves n tensors; backward frees each as it goes, so the peak is n and a few more."""
    size = 1 << 18
    with fake_gpu(HOPPER) as device, Counter(device) as counter:
        x = torch.empty(size // 4, device=device, requires_grad=True)
        y = x
        for _ in range(10):
            y = y.square()
        loss = y.sum()
        del y
        assert counter.memory.held == 10 * size + 512  # the sum needs no values of the last square
        loss.backward()
        assert counter.memory.held == 2 * size + 512 and counter.finish().peak <= 14 * size
        assert x.grad.shape == x.shape


def test_gradients_are_those_of_the_engine() -> None:
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v))
            return (x + F.gelu(self.out(x[:, [2, 0]])).mean(1, keepdim=True)).square().mean()

    real, walked, x = Small(), None, torch.randn(3, 5, 8)
    walked = copy.deepcopy(real)
    real(x).backward()
    with mock.patch("torch.autograd._engine_run_backward", run_backward):
        walked(x).backward()
    for (name, expected), found in zip(real.named_parameters(), walked.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_gradients_of_chosen_tensors_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    weight, x, unused = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.ones(2)

    def gradients() -> tuple[torch.Tensor | None, ...]:
        hidden = (x @ weight).relu()
        chosen = [hidden, x, unused.requires_grad_()]
        return torch.autograd.grad((hidden @ weight + x).square().sum(), chosen, allow_unused=True)

    expected = gradients()
    with mock.patch("torch.autograd._engine_run_backward", run_backward):
        found = gradients()
    assert expected[2] is found[2] is weight.grad is x.grad is None
    torch.testing.assert_close(found[:2], expected[:2])


def test_a_real_step_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights that oneDNN has packed have no storage to be counted.
    monkeypatch.setattr("kernels.library._eager", lambda *tensors: False)
    config = stage1_config("tiny", 2, "fp32")
    video = random_video(2, 8, 64, CPU)
    step, _ = fast_steps(config, video, CPU)
    with Counter(CPU) as counter:
        step(0)
        counter.restart()
        step(1)
        found = counter.finish()
    products = sum(operation.products for operation in found.operations)
    assert products == pytest.approx(2 * UnmaskedAlignment.flops_of(config), rel=0.02)
    assert {"addmm"} <= names(found, "teacher") & names(found, "student")
