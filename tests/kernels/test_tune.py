"""Tiles that were measured: found with a clock of the test's, kept in a file, used by the products they were measured for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import tune
from kernels.linear import layers
from kernels.linear import product as products
from kernels.linear import tiles as choice
from kernels.linear.tiles import Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def forgotten():
    """By the rule before and behind each test."""
    kernels.use_tiles(None)
    yield
    kernels.use_tiles(None)


def work() -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, first, second = (
        torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for shape in ((150, 64), (256, 64), (64, 256))
    )
    out = kernels.mlp(x, first, None, second, None, residual=torch.randn(150, 64, device=DEVICE), backend="triton")
    values, scales = kernels.quantize_rows(x.detach(), "int8")
    eight = kernels.quantize_weight(first.detach(), "int8")
    hidden, blocks = kernels.scaled_linear(
        values, scales, *eight, activation="gelu", dtype=torch.int8, backend="triton"
    )
    gradients = torch.autograd.grad(out.square().sum(), (x, first, second))
    return [out.detach(), *gradients, hidden.float() * blocks.repeat_interleave(128, 1)]


class Clock:
    """Milliseconds that depend on the tiles of the launch alone: those of a height are fast."""

    def __init__(self, high: int) -> None:
        self.high = high

    def __call__(self, fn) -> float:
        grids, plain = [], products.product_kernel

        class Noting:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    grids.append(options)
                    return plain[grid](*args, **options)

                return launch

        products.product_kernel = Noting()
        try:
            fn()
        finally:
            products.product_kernel = plain
        return 1.0 if grids[-1]["BLOCK_M"] == self.high else 2.0


def test_the_fastest_tiles_are_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *args, **options: list(few(*args, **options))[:4])
    plain, clock = work(), Clock(64)
    table = tune.tune_tiles(work, tmp_path / "tiles.json", timer=clock)
    assert json.loads((tmp_path / "tiles.json").read_text()) == table
    # Two products forward, their gradients, and one in 8 bits.
    assert len(table["forms"]) == 6 + 1 and not choice.recorded
    assert {entry["wrong"] + entry["failed"] for entry in table["forms"].values()} == {0}
    others = [entry for name, entry in table["forms"].items() if entry["rule_us"] == 2000 > entry["us"]]
    assert others and all(entry["tiles"]["BLOCK_M"] == 64 for entry in others)
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    kernels.use_tiles(tmp_path / "tiles.json")
    launched, chosen = [], choice.tiles_of

    def note(form: Form, device: torch.device) -> dict[str, int]:
        launched.append((form.name, chosen(form, device)))
        return launched[-1][1]

    for module in (choice, layers):
        monkeypatch.setattr(module, "tiles_of", note)
    tuned = work()
    assert {name for name, _ in launched} == set(table["forms"])
    assert all(tiles == table["forms"][name]["tiles"] for name, tiles in launched)
    for ours, theirs in zip(tuned, plain, strict=True):
        assert (ours - theirs).float().norm() < 1e-2 * theirs.float().norm()


def test_tiles_with_other_numbers_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tune._launch

    def wrong(recorded, tiles):
        run = plain(recorded, tiles)
        rule = choice.by_rule(choice.form_of(recorded[0], recorded[1], {}, False), recorded[0].device)
        return run if tiles["BLOCK_M"] == rule["BLOCK_M"] else lambda: (run(), recorded[0].add_(1))

    monkeypatch.setattr(tune, "_launch", wrong)
    x, weight = torch.randn(150, 64, device=DEVICE), torch.randn(256, 64, device=DEVICE)
    few = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *args, **options: list(few(*args, **options))[:6])
    run = lambda: kernels.linear(x, weight, backend="triton")  # noqa: E731
    table = tune.tune_tiles(run, tmp_path / "tiles.json", timer=Clock(64))
    (entry,) = table["forms"].values()
    assert entry["wrong"] > 0 and entry["tiles"]["BLOCK_M"] == 128


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with pytest.raises(ValueError, match="is no table of tiles: FileNotFoundError.*python -m kernels.tune"):
        kernels.use_tiles(path)
    for text in (
        "[]",
        "{",
        '{"format": "other"}',
        '{"format": "umt_kernels tiles 1", "forms": {"a": {}}, "device": "x"}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no table of tiles"):
            kernels.use_tiles(path)
    path.write_text(json.dumps({"format": choice.FORMAT, "device": "NVIDIA Z1", "forms": {}}))
    with pytest.raises(ValueError, match="is for NVIDIA Z1, but this is"):
        kernels.use_tiles(path)
    with pytest.raises(ValueError, match="launched no product"):
        tune.tune_tiles(lambda: None, path)


def test_the_variable_names_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(150, 256, 64, torch.float32, "nn", False, False)
    device = torch.device(DEVICE)
    other = dict(choice.by_rule(form, device), num_stages=2, BLOCK_M=64)
    path = tmp_path / "tiles.json"
    table = {"format": choice.FORMAT, "device": choice.device_name(device), "forms": {form.name: {"tiles": other}}}
    path.write_text(json.dumps(table))
    monkeypatch.setattr(choice, "_tuned", None)
    monkeypatch.setenv(choice.VARIABLE, str(path))
    assert choice.tiles_of(form, device) == other != choice.by_rule(form, device)
    assert choice.tiles_of(form._replace(K=32), device) == choice.by_rule(form._replace(K=32), device)


def test_candidates_fit_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "limits", lambda device: (90, 132, 227 << 10))
    form = Form(20480, 3072, 768, torch.bfloat16, "nn", False, True)
    found = list(tune.candidates(form, torch.device("cuda")))
    assert len(found) > 20 and choice.by_rule(form, torch.device("cuda")) not in found
    for tiles in found:
        stage = (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * tiles["BLOCK_K"] * 2
        assert stage * tiles["num_stages"] < 227 << 10
    eight = tune.candidates(form._replace(dtype=torch.int8), torch.device("cuda"), quantizes=True)
    assert all(tiles["BLOCK_N"] // tiles["PARTS"] >= 128 for tiles in eight)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_command_needs_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.tune", str(tmp_path / "tiles.json")],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("tune: there is no GPU here")


@pytest.mark.slow
def test_the_command_tunes_the_products_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small step, since they are interpreted."""
    monkeypatch.setitem(tune.SIZES, "b16", (64, 1, 16, 64))
    monkeypatch.setattr(tune, "candidates", lambda *args, **options: [])
    run = lambda: tune.step_products("b16", 1, torch.device(DEVICE), torch.bfloat16)  # noqa: E731
    table = tune.tune_tiles(run, tmp_path / "tiles.json", timer=Clock(64))
    layouts = {name.split()[2] for name in table["forms"]}
    assert layouts == {"nn", "nt", "tt"} and len(table["forms"]) >= 14
