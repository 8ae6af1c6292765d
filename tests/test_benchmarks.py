"""What the benchmarks make of their figures; the figures themselves are nobody's test."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import amortized, bench_kernels, compare
from benchmarks.bench_kernels import figures
from benchmarks.kernel_cases import DEVICE, Case
from benchmarks.profile_step import covered, kind_of, shares
from benchmarks.report import main, newest


def write(path: Path, *rows: dict, tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_tables_of_a_cpu(tmp_path: Path, capsys) -> None:
    (tmp_path / "machine.json").write_text(json.dumps({"device": "Some CPU"}))
    row = {
        "bench": "stage1",
        "model": "b16",
        "batch_size": 4,
        "teacher_precision": "native",
        "share_of_matmul_rate": 0.9,
        "peak_memory_gib": 3.0,
        "dtype": "fp32",
        "computed_in": "fp32",
    }
    plain = row | {"implementation": "plain", "peak_memory_gib": 4.0}
    fast, official, half = (
        row | {"implementation": "fast"},
        row | {"implementation": "official"},
        {"dtype": "bf16", "computed_in": "bf16"},
    )
    write(
        tmp_path / "cpu_steps_b16.jsonl",
        fast | {"clips_per_s": 0.5},
        plain | {"clips_per_s": 0.25},
        fast | {"clips_per_s": 0.3, "peak_memory_gib": 3.5},
        plain | {"clips_per_s": 0.2},
        fast | half | {"clips_per_s": 0.4, "teacher_precision": "int8"},
        plain | half | {"clips_per_s": 0.1},
        official | half | {"clips_per_s": 0.125},
    )
    part = {"part": "loss", "ms": 20.0, "gflop": 0.5, "mb": 30.0, "bound_ms": 10.0, "share_of_bound": 0.5}
    write(
        tmp_path / "parts_b16.jsonl",
        row | {"parts": [part], "matmul_tflops": 0.2, "copy_gb_per_s": 20.0, "memory_gib": {}},
    )
    reader = {name: {"clips_per_cpu_s": {"cpu": r, "decord": 3.0}} for name, r in (("a.mp4", 6.0), ("b.mp4", 3.0))}
    against = [{"file": f, "against_decord": {"cpu": v["clips_per_cpu_s"]["cpu"] / 3}} | v for f, v in reader.items()]
    write(tmp_path / "input.jsonl", *against)
    write(tmp_path / "soak.jsonl", *({"clips": n, "mib": {"main": 500.0 + n, "children": 800.0}} for n in range(1, 6)))
    main(tmp_path)
    text = capsys.readouterr().out
    assert "| stage1, b16, 4 clips | fast | fp32 | 0.500, 0.300 | 2.00, 1.50 |  | 90% | 3.50 |" in text
    assert "| fast, int8 teacher | bf16 | 0.400 | 4.00 | 3.20 |" in text
    assert "b16, 4 clips, fp32, native teacher" in text and "| loss | 20.0 | 0.5 | 30.0 | 10.0 | 50% |" in text
    # Two clips in 1/6 + 1/3 s of processor time are 4 per second.
    assert "| together | 4.0 (1.33x) | 3.0 (1.00x) |" in text
    assert [line.split()[1] for line in text.splitlines()[-3:]] == ["1", "3", "5"]
    assert not (tmp_path / "plot.svg").exists()
    (tmp_path / "soak.jsonl").write_text('{"clips"\n{}\n')
    with pytest.raises(SystemExit, match="soak.jsonl, line 1 is no JSON"):
        main(tmp_path)


def test_the_newest_results_are_those_of_the_latest_date(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    for name, date in (("a", "2026-11-02T10:00Z"), ("b", "2026-11-10T09:00Z"), ("c", "2026-11-09T12:00Z")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "machine.json").write_text(json.dumps({"date": date}))
    assert newest().name == "b"


def test_a_provider_that_fails_is_on_record() -> None:
    def fails() -> None:
        raise ValueError("not on this device\nand more")

    row = figures(Case("gather", {"ours": fails}), "ours", 1e9)
    assert row["error"] == "ValueError: not on this device" and row["copy_gb_per_s"] == 1.0


def test_work_is_told_apart_by_name() -> None:
    assert kind_of("fmha_cutlassF_bf16_aligned") == kind_of("cudnn_generated_fort_native_sdpa_sm90") == "attention"
    assert kind_of("sm90_xmma_gemm_bf16bf16") == kind_of("aten::addmm") == "matrix products"
    assert kind_of("_patch_gather_kernel") == "our kernels" and kind_of("aten::gelu") == "other element-wise"
    assert shares([("aten::mm", 3.0), ("aten::add", 1.0), ("aten::bmm", 4.0)]) == {
        "matrix products": 0.875,
        "other element-wise": 0.125,
    }


def test_a_device_is_busy_while_any_kernel_runs() -> None:
    assert covered([(0.0, 1.0), (4.0, 5.0), (0.5, 2.0), (4.2, 4.5)]) == (3.0, 5.0)
    assert covered([]) == (0.0, 0.0)


def test_several_masks_of_a_clip_cost_less_than_as_many_runs(tmp_path: Path) -> None:
    costs = {}
    for variant in amortized.VARIANTS:
        config = amortized.config_of(tmp_path, 0, variant)
        config.teacher.weights = "untrained"
        costs[variant] = amortized.cost(config) / variant.epochs
    one = costs[amortized.OWN]
    assert costs[(4, 2)] == costs[(4, 3)]  # of an epoch
    assert one < costs[(2, 3)] < 2 * one and costs[(2, 3)] < costs[(4, 3)] < 2 * costs[(2, 3)]
    folders = {amortized.config_of(tmp_path, 0, variant).run.out for variant in amortized.VARIANTS}
    assert len(folders) == len(amortized.VARIANTS)
    with pytest.raises(SystemExit, match="no finished quickstart"):
        amortized.main(tmp_path)


def other_libraries() -> dict[str, Any]:
    """Liger and quack by the functions that compare calls: their signatures, of 0.8.5 and 0.6.5, and the plain formulas."""

    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        assert x.ndim == 2 and weight.dtype == bias.dtype == torch.float32
        variance, mean = torch.var_mean(x.float(), 1, correction=0)
        rstd = (variance + eps).rsqrt()
        out = ((x - mean[:, None]) * rstd[:, None] * weight + bias).to(x.dtype)
        more = [part for part, wanted in ((rstd, return_rstd), (mean, return_mean)) if wanted]
        return (out, *more) if more else out

    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        assert x.dtype == dout.dtype
        standard, slope = (x - mean[:, None]) * rstd[:, None], dout * weight
        parts = slope.mean(1, keepdim=True) + standard * (slope * standard).mean(1, keepdim=True)
        dx = rstd[:, None] * (slope - parts)
        return dx, (dout * standard).sum(0), dout.sum(0) if has_bias else None

    def gemm(A, B, out=None, bias=None, alpha=1.0):
        return alpha * A @ B + bias

    def gemm_add(A, B, C, out=None, bias=None, alpha=1.0, beta=1.0):
        return alpha * A @ B + beta * C + bias

    class LigerLayerNormFunction:
        @staticmethod
        def apply(X, W, B, eps):
            return torch.nn.functional.layer_norm(X, W.shape, W, B, eps)

    return {
        "quack": {},
        "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd, "layernorm_bwd": layernorm_bwd},
        "quack.gemm_interface": {"gemm": gemm, "gemm_add": gemm_add},
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
    }


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compares values of fp32")
def test_the_columns_of_compare_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in other_libraries().items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    seen = {}
    for case in compare.own_cases():
        results = {}
        for provider, call in case.providers.items():
            torch.manual_seed(0)  # of the upstream gradients
            made = call()
            results[provider] = made if isinstance(made, tuple) else (made,)
        for provider, parts in results.items():
            for ours, theirs in zip(results["ours"], parts, strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4, msg=f"{case.name}, {provider}")
        seen[case.name] = set(results) - {"ours", "plain", "compiled"}
    both = {"liger", "quack"}
    norms = {f"layer_norm{more} {way}": both for more in ("", " alone") for way in ("forward", "backward")}
    products = {"mlp forward": set(), "mlp backward": set(), "linear gelu": set()}
    assert seen == norms | products | {"linear bias": {"quack"}, "linear residual": {"quack"}}


def test_a_library_that_does_not_import_is_told_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare.found("no_such_library.part", "function") is None
    with pytest.raises(ImportError, match="math.no_such.apply is not there: AttributeError"):
        compare.found("math", "no_such.apply")(1, eps=2)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    with pytest.raises(ImportError, match="ModuleNotFoundError"):  # of another version: a part of it is missing
        compare.found("liger_kernel.ops.layer_norm", "LigerLayerNormFunction.apply")()


def test_bytes_that_fit_the_cache_bound_nothing() -> None:
    case = Case("copy", {}, bytes_moved=1000.0, flops=30.0)
    assert bench_kernels.bound_of(case, 100.0, 10.0, 999) == 10.0
    assert bench_kernels.bound_of(case, 100.0, 10.0, 1000) == 3.0
    assert bench_kernels.bound_of(Case("copy", {}, bytes_moved=1000.0), 100.0, 10.0, 1000) == 0
    assert DEVICE.type == "cpu" or bench_kernels.cache_bytes() == 0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the cases of this process are on its GPU")
def test_compare_makes_a_table_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "UMT_BENCH"):  # which it sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(compare, "found", lambda module, name: None)
    text = compare.main(["layer_norm", "mlp forward", "--device", "cpu", "--size", "tiny"])
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["operation", "ours", "torch", "Liger", "quack", "share of bound"]
    norms = [f"layer_norm{more} {way}" for more in ("", " alone") for way in ("forward", "backward")]
    assert [line[0] for line in lines[2:]] == [*norms, "mlp forward"]
    for name, ours, plain, liger, quack, share in lines[2:]:
        assert float(ours) > 0 and float(plain) > 0 and liger == quack == "-"
        # So small a LayerNorm moves bytes within the cache alone.
        assert share == "-" if name in norms else share.endswith("%")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the cases of this process are on its GPU")
def test_compare_shows_compiled_code_on_a_cpu_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "UMT_BENCH"):  # which it sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    names = ["layer_norm alone", "gather_norm", "token_gather"]
    text = compare.main([*names, "--device", "cpu", "--size", "tiny", "--compile"])
    rows = {
        cells[0]: cells[3] for cells in (line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line)
    }
    assert rows.pop("operation") == "torch.compile" and rows.pop("token_gather backward") == "-"
    rows.pop("---")
    assert len(rows) == 4 and all(float(figure) > 0 for figure in rows.values())


def test_compare_names_an_operation_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "UMT_BENCH"):  # which it sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit, match="no operation begins with layer_nrm"):
        compare.main(["layer_nrm", "--device", "cpu", "--size", "tiny"])


def test_compare_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU; --device cpu compares the CPU backends"):
        compare.main([])
