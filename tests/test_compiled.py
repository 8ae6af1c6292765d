"""The compiled training step of a GPU that is not there: one graph each way, every kernel counted, nothing copied."""

import ast
import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

import kernels
from benchmarks.counted import Operation
from benchmarks.fake_gpu import OLDEST_TORCH, TORCH

if TORCH < OLDEST_TORCH:
    pytest.skip(
        f"predictions need torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}; nothing else does", allow_module_level=True
    )

from benchmarks.compiled import GENERATED, Compiled, compile_step, kernels_of, main, passes
from benchmarks.fake_inductor import lower
from benchmarks.predict import count
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import ConfigError, Stage1Config

pytestmark = [pytest.mark.compile, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[1]
AMPERE, HOPPER = (8, 0), (9, 0)


def small(precision: str) -> Stage1Config:
    """Two blocks under three; rows of tensors are whole cache lines, so that Inductor pads none."""
    config = stage1_config("tiny", 2, "bf16", precision)
    config.student.width, config.student.num_heads, config.student.depth = 128, 2, 2
    config.teacher.width, config.teacher.num_heads, config.teacher.depth = 128, 2, 3
    config.align.num_layers = 2
    return config


@functools.cache
def compiled(precision: str, capability: tuple[int, int]) -> Compiled:
    return compile_step(small(precision), capability)


@pytest.fixture(scope="module", params=[("native", HOPPER), ("fp8", HOPPER), ("int8", AMPERE)], ids=lambda p: p[0])
def step(request: pytest.FixtureRequest) -> tuple[Stage1Config, tuple[int, int], Compiled]:
    precision, capability = request.param
    return small(precision), capability, compiled(precision, capability)


def test_the_step_compiles_as_one_graph_each_way(step: tuple) -> None:
    config, capability, found = step
    assert len(found.code) == 2
    names = [kernel.name.removeprefix("umt_kernels.").removesuffix(".default") for kernel in found.kernels]
    for name in ("patch_gather", "semantic_mask", "gather_norm", "token_gather", "align_loss", "align_loss_backward"):
        assert name in names, names
    # Nothing on the host, for which a stream would wait.
    assert not any("empty_strided_cpu(" in code or ".item()" in code for code in found.code)
    # Of our operators and of attention the arithmetic is that of the eager step.
    eager = count(config, "fast", capability).operations
    for flops in ("products", "products8"):
        expected = sum(getattr(operation, flops) for operation in eager)
        assert sum(getattr(kernel, flops) for kernel in found.kernels) == expected
    assert sum(kernel.bytes for kernel in found.kernels) < sum(operation.bytes for operation in eager)


def test_what_the_products_give_is_not_copied(step: tuple) -> None:
    config, _, found = step
    aligned = config.align.num_layers * 2 * 8 * 4 * config.teacher.output_dim * 2
    copies = [
        kernel
        for kernel in found.kernels
        if kernel.name.startswith(GENERATED)
        and kernel.part != "backward"
        and kernel.bytes >= aligned
        and ("stack" in kernel.name or "cat" in kernel.name.removeprefix(GENERATED).split("_"))
        and "expand" not in kernel.name  # the class token before its patches
    ]
    assert not copies


def test_the_residual_stream_is_not_computed_anew(step: tuple) -> None:
    config, _, found = step
    tokens = 2 * 8 * 17 * config.teacher.width * 2
    norms = [k.bytes for k in found.kernels if k.part == "teacher" and "native_layer_norm" in k.name]
    # Reads it and two branches, writes it and its norm; the first comes as fp32.
    assert tokens < max(norms) < 6.5 * tokens


class Two(nn.Module):
    """What the teacher does with intermediate features: two operators of ours and the next sum read it."""

    def forward(self, x: Tensor, y: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        normed = kernels.gather_norm(total, rows, weight, weight)
        return normed, kernels.token_gather(total, rows), total.relu()


def two(device: torch.device) -> tuple[Tensor, ...]:
    """Its arguments."""
    x = torch.empty(4, 64, 256, dtype=torch.bfloat16, device=device)
    return x, torch.empty_like(x), torch.empty(4, 8, dtype=torch.int32, device=device), torch.empty(256, device=device)


def test_what_our_operators_read_is_stored_once() -> None:
    found: list[Operation] = []
    lower(lambda device: (Two(), two(device)), HOPPER, lambda graph, code: found.extend(kernels_of(graph)), {})
    generated = sum(kernel.bytes for kernel in found if kernel.name.startswith(GENERATED))
    # Two terms in, their sum and what the next makes of it out.
    assert len(found) == 3 and generated == 4 * 4 * 64 * 256 * 2, found


def test_what_inductor_would_time_is_left_out() -> None:
    """Rows of 588 numbers, the patches of CLIP's L/14, which Inductor may pad."""
    found: list[Operation] = []

    def make(device: torch.device) -> tuple[nn.Module, tuple[Tensor]]:
        layer = nn.Linear(588, 1024, bias=False, dtype=torch.bfloat16).to(device)
        return layer, (torch.empty(100352, 588, dtype=torch.bfloat16, device=device),)

    lower(make, HOPPER, lambda graph, code: found.extend(kernels_of(graph)), {})
    assert [kernel.products for kernel in found] == [2 * 100352 * 588 * 1024] * 2


def test_what_torch_knows_of_this_machine_neither_enters_nor_stays() -> None:
    here = has_triton()  # kept by torch; without a GPU False
    lower(lambda device: (Two(), two(device)), HOPPER, lambda graph, code: None, {})
    assert has_triton() == here


def test_kernels_by_kind() -> None:
    found = passes(
        [
            Operation("student", "Mlp", "addmm.default", 100.0, 0.0, 10.0),
            Operation("student", "Mlp", f"{GENERATED}gelu", 0.0, 0.0, 40.0),
            Operation("rest", "", "align_loss.default", 0.0, 0.0, 2e9),
        ],
        10.0,
        2.0,
    )
    assert found["products"] == {"launches": 1, "ms": 10_000, "gb": 0} and found["generated"]["ms"] == 20_000
    assert found["calls"] == {"launches": 1, "ms": 1e12, "gb": 2}


BUILD = """
from benchmarks.compiled import resources_of
from benchmarks.fake_inductor import lower
from tests.test_compiled import Two, two
for capability in ((8, 0), (9, 0)):
    codes = []
    lower(lambda device: (Two(), two(device)), capability, lambda graph, code: codes.append(code), {})
    print(resources_of(codes, capability))
"""


def test_inductors_kernels_build_for_both_generations() -> None:
    # A process of its own: here Triton may interpret, which rules compiling out.
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert found == 2 * [{"kernels": 1, "spilling": {}}]


def test_line_and_table_say_prediction(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.compiled.stage1_config", lambda model, batch_size, dtype, precision: small(precision)
    )
    monkeypatch.setattr(
        "benchmarks.compiled.compile_step",
        # One compilation for all: an A100's own is not what this is about.
        lambda config, capability: copy.deepcopy(
            compiled("native" if config.teacher.precision == "native" else "fp8", HOPPER)
        ),
    )
    main("tiny", 2, "all", top=3)
    out = capsys.readouterr()
    a100, line, h200 = map(json.loads, out.out.splitlines())
    assert line["kind"] == "prediction" and len(line["most_gb"]) == 3
    assert "compiled, int8 teacher" in a100["steps"] and a100["gpu"].startswith("A100")
    # The same kernels at a higher bandwidth.
    one, other = (row["steps"]["compiled, fp8 teacher"] for row in (line, h200))
    assert one["gb"] == other["gb"] and one["bound_ms"] > other["bound_ms"]
    assert list(line["steps"]) == [
        f"{step}{of}" for of in ("", ", fp8 teacher") for step in ("eager", "compiled", "ideal")
    ]
    steps = line["steps"]
    assert steps["ideal"]["bound_ms"] <= steps["compiled"]["bound_ms"] <= steps["eager"]["bound_ms"]
    assert all("prediction" in row for row in out.err.splitlines() if row.startswith("|") and "---" not in row)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        main("tiny", 0)
