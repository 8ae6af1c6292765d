"""Rules of stage 2 against numbers that the official code wrote: negatives, alignment, schedule, weight decay, masks."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import kernels
from tests.parity_files import parity_files
from umt_fast.config import ConfigError, OptimConfig, TextConfig, VitConfig
from umt_fast.engine.optim import build_optimizer, parameter_groups
from umt_fast.engine.schedule import warmup_cosine
from umt_fast.engine.sharding import load_states
from umt_fast.masking import MAX_SCORES, TokenGrid, mask_named, num_visible
from umt_fast.models.video_text import HEAD_EPS, VideoText
from umt_fast.reference.stage2 import PlainStage2
from umt_fast.tasks import video_text_losses as vision_text


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])


def name(path: Path) -> str:
    return path.name


# Draws of each row at each temperature, and the chance at which a statistic counts as wrong (a file makes some 70 of them).
DRAWS, CHANCE = 3000, 1e-7


def too_large(statistic: float, degrees: int) -> bool:
    """Whether chi-square has this value by a chance below CHANCE (Wilson and Hilferty's normal approximation)."""
    deviate = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return math.erfc(deviate / math.sqrt(2)) / 2 < CHANCE


def misfit(counts: list[int], expected: list[float]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, cells of fewer than five expected draws taken together."""
    cells = [(have, want) for have, want in zip(counts, expected, strict=True) if want >= 5]
    rest = [(have, want) for have, want in zip(counts, expected, strict=True) if want < 5]
    have, want = sum(cell[0] for cell in rest), sum(cell[1] for cell in rest)
    if want > 0.5:
        cells.append((have, want))
    elif have > 20:  # draws that hardly ever happen
        return math.inf, 1
    return sum((have - want) ** 2 / want for have, want in cells), max(1, len(cells) - 1)


def cosines(tensors: dict[str, Tensor]) -> Tensor:
    """(clips, texts) in float64, averaged over a clip's vectors."""
    vision, text = tensors["in.vision"].double(), tensors["in.text"].double()
    vision, text = vision / vision.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    return torch.einsum("mld,nd->mln", vision, text).mean(1)


def chances(scores: list[float], allowed: list[bool]) -> list[float]:
    """Of each column in float64, by the exponential's definition: positives out, the rest in proportion."""
    top = max(score for score, may in zip(scores, allowed, strict=True) if may)
    weights = [math.exp(score - top) if may else 0.0 for score, may in zip(scores, allowed, strict=True)]
    return [weight / math.fsum(weights) for weight in weights]


@pytest.fixture(params=parity_files("negatives"), ids=name)
def negatives(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], list[float]]:
    tensors, config = read(request.param)
    return tensors, config["temperatures"]


def similarities(tensors: dict[str, Tensor], temperature: float) -> vision_text.Similarity:
    vision = F.normalize(tensors["in.vision"], dim=-1).mean(1)
    text = F.normalize(tensors["in.text"], dim=-1)
    return vision_text.similarity(vision, text, tensors["in.idx"], torch.tensor(temperature))


def test_chances_are_the_official_weights(negatives) -> None:
    """The float64 truth of the next test, against the weights that the official code handed to its sampler."""
    tensors, temperatures = negatives
    index, compared = tensors["in.idx"], 0
    for number, temperature in enumerate(temperatures):
        for key, scores in (("t2v", cosines(tensors).t()), ("v2t", cosines(tensors))):
            for row, official in enumerate(tensors[f"out.{number}.{key}"].double()):
                if official.sum() > 1e-30:  # else underflown in fp32
                    own = chances((scores[row] / temperature).tolist(), (index != index[row]).tolist())
                    torch.testing.assert_close(
                        official / official.sum(), torch.tensor(own).double(), rtol=2e-3, atol=1e-6
                    )
                    compared += 1
    assert compared > 3 * 2 * len(index)


@pytest.mark.slow
def test_negatives_are_drawn_by_the_official_weights(negatives) -> None:
    tensors, temperatures = negatives
    index = tensors["in.idx"]
    for temperature in temperatures:
        sim = similarities(tensors, temperature)
        drawn = [vision_text.draw_negatives(sim, torch.tensor([seed])) for seed in range(DRAWS)]
        for side, scores in ((0, cosines(tensors).t()), (1, cosines(tensors))):
            picked = torch.stack([pair[side] for pair in drawn])
            for row in range(len(index)):
                allowed = index != index[row]
                counts = picked[:, row].bincount(minlength=len(index))
                assert counts[~allowed].sum() == 0, f"temperature {temperature}: drew the own sample"
                expected = chances((scores[row] / temperature).tolist(), allowed.tolist())
                statistic, degrees = misfit(counts.tolist(), [DRAWS * chance for chance in expected])
                assert not too_large(statistic, degrees), (temperature, side, row, counts.tolist(), expected)


def test_plain_negatives_are_drawn_by_the_official_weights(negatives) -> None:
    """The reference hands its sampler what the official code hands its own."""
    tensors, temperatures = negatives
    equal = (tensors["in.idx"][:, None] == tensors["in.idx"][None]).float()
    for number, temperature in enumerate(temperatures):
        seen = []

        def noted(weights: Tensor, count: int, seen: list[Tensor] = seen) -> Tensor:
            seen.append(weights)
            return torch.zeros(len(weights), count, dtype=torch.long)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", noted)
            PlainStage2._draw_negatives(None, (cosines(tensors) / temperature).float(), equal)
        for weights, key in zip(seen, ("t2v", "v2t"), strict=True):
            torch.testing.assert_close(weights, tensors[f"out.{number}.{key}"], rtol=1e-3, atol=1e-9)


def test_a_batch_of_one_sample_still_draws() -> None:
    """There is no wrong answer to draw; officially the draw fails. Ours is uniform, and so is it where nothing is finite."""
    sim = vision_text.similarity(torch.eye(4), torch.eye(4), torch.zeros(4, dtype=torch.int64), torch.tensor(0.001))
    drawn = torch.stack([vision_text.draw_negatives(sim, torch.tensor([seed]))[0] for seed in range(400)])
    assert all(drawn[:, row].unique().numel() == 4 for row in range(4))
    sim = vision_text.similarity(torch.eye(4), torch.eye(4), torch.arange(4), torch.tensor(0.07))
    sim = sim._replace(t2v=torch.full((4, 4), torch.nan))
    drawn = torch.stack([vision_text.draw_negatives(sim, torch.tensor([seed]))[0] for seed in range(400)])
    for row in range(4):
        counts = drawn[:, row].bincount(minlength=4).tolist()
        assert counts[row] == 0 and min(counts[:row] + counts[row + 1 :]) > 80


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("path", parity_files("alignment"), ids=name)
def test_alignment_by_every_normalisation_and_distance(path: Path, backend: str) -> None:
    tensors, _ = read(path)
    compared = 0
    for key, value in tensors.items():
        if key.startswith("out."):
            _, normalize, loss = key.split(".")
            heads = tensors["in.heads"].clone().requires_grad_()
            with kernels.force_backend(backend):
                found = kernels.align_loss(
                    heads,
                    tensors["in.targets"],
                    tensors["in.weight"],
                    tensors["in.bias"],
                    eps=HEAD_EPS,
                    normalize=normalize,
                    loss=loss,
                )
                found.backward()
            torch.testing.assert_close(found.detach().view(1), value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(heads.grad, tensors[f"grad.{normalize}.{loss}"], rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared == 6


SCHEDULES = parity_files("optimizer") + parity_files("load_downstream")


@pytest.mark.parametrize("path", SCHEDULES, ids=name)
def test_scaled_cosine_is_the_official_schedule_of_stage_2(path: Path) -> None:
    tensors, _ = read(path)
    compared = 0
    for key, factors in tensors.items():
        if not key.startswith("schedule."):
            continue
        words = key.removeprefix("schedule.").split("_")
        steps, warmup, floor = int(words[0]), float(words[2]), float(words[-1])
        optim = OptimConfig(lr=3e-4, schedule="scaled_cosine", min_factor=floor, min_lr=0.0, lr_batch=0)
        # One epoch a step and many steps an epoch must come to the same.
        for per_epoch in (1, 2) if steps % 2 == 0 else (1,):
            rate = warmup_cosine(
                optim,
                global_batch=64,
                steps_per_epoch=per_epoch,
                epochs=steps // per_epoch,
                warmup_epochs=warmup / per_epoch,
            )
            own = torch.tensor([rate(step) for step in range(steps)], dtype=torch.float64)
            torch.testing.assert_close(own, 3e-4 * factors, rtol=1e-9, atol=1e-18)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("path", parity_files("settings"), ids=name)
def test_linear_cosine_is_the_official_schedule_of_stage_1_and_fine_tuning(path: Path) -> None:
    tensors, config = read(path)
    compared = 0
    for key, run in config.items():
        warmup = run["schedule"]["warmup_epochs"]
        if run["schedule"]["warmup_steps"] > 0:  # an option we express in epochs
            warmup = run["schedule"]["warmup_steps"] / run["steps_per_epoch"]
        optim = OptimConfig(
            lr=run["peak_lr"],
            min_lr=run["min_lr"],
            warmup_lr=run["schedule"].get("start_warmup_value", 0.0),
            lr_batch=0,
        )
        rate = warmup_cosine(
            optim, global_batch=1, steps_per_epoch=run["steps_per_epoch"], epochs=run["epochs"], warmup_epochs=warmup
        )
        expected = tensors[f"{key}.lr"]
        own = torch.tensor([rate(step) for step in range(len(expected))], dtype=torch.float64)
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-18)
        compared += 1
    assert compared


def test_a_schedule_refuses_what_it_does_not_read() -> None:
    with pytest.raises(ConfigError, match="optim.min_lr is 1e-05.*scaled_cosine"):
        OptimConfig(schedule="scaled_cosine")
    with pytest.raises(ConfigError, match="optim.min_factor is 0.01.*linear_cosine"):
        OptimConfig(min_factor=0.01)


def stage2_model(layers: int, fusion: int, depth: int) -> VideoText:
    vit = VitConfig(width=16, depth=depth, num_heads=2, image_size=16, patch_size=8, num_frames=2)
    text = TextConfig(width=16, depth=layers, fusion_layer=fusion, num_heads=2, vocab_size=20, max_positions=8)
    return VideoText(vit, text, num_layers=2, output_dim=8, embed_dim=8)


@pytest.mark.parametrize("path", parity_files("optimizer"), ids=name)
def test_every_parameter_decays_as_officially(path: Path) -> None:
    _, config = read(path)
    sizes, official = config["sizes"], config["weight_decay"]
    model = stage2_model(sizes["layers"], sizes["fusion"], sizes["depth"])
    groups = parameter_groups(model, OptimConfig(weight_decay=0.02))
    own = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = {key: own[id(parameter)] for key, parameter in model.named_parameters()}
    # The official head has its bias under a second name too.
    official = {key: value for key, value in official.items() if key in found or not key.startswith("clip_teacher.")}
    assert found == official and found["temp"] == 0.02


@pytest.mark.parametrize("path", parity_files("load_downstream"), ids=name)
def test_every_parameter_decays_as_officially_in_retrieval(path: Path) -> None:
    _, config = read(path)
    official = config["weight_decay"]["retrieval"]
    depth = 1 + max(int(key.split("blocks.")[1].split(".")[0]) for key in official if "blocks." in key)
    model = stage2_model(config["layers"], config["fusion"], depth)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.02))
    own = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = {key.replace(".bert.", "."): own[id(parameter)] for key, parameter in model.named_parameters()}
    assert set(official) <= set(found)
    assert {key: found[key] for key in official} == official


def test_an_optimizer_saved_before_scalars_decayed_is_continued() -> None:
    """Earlier versions kept the temperature among the parameters without decay: same numbers, two groups."""
    torch.manual_seed(0)
    model, optim = stage2_model(2, 1, 1), OptimConfig(weight_decay=0.02)
    groups = parameter_groups(model, optim)
    assert [len(group["params"]) for group in groups][1] == 1 and groups[1]["params"][0] is model.temp
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    matrices = [p for p in model.parameters() if p in set(groups[0]["params"])]
    rest = [p for p in model.parameters() if p not in set(groups[0]["params"])]
    before = torch.optim.AdamW(
        [{"params": matrices, "lr_scale": 1.0}, {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0}], lr=1e-3
    )
    before.step()
    now = build_optimizer(model, optim, lr=1e-3)
    load_states(model, now, model.state_dict(), before.state_dict())
    assert [group["weight_decay"] for group in now.param_groups] == [0.02, 0.02, 0.0]
    for parameter in model.parameters():
        assert torch.equal(now.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])


@pytest.mark.parametrize("path", parity_files("masks"), ids=name)
def test_masks_hide_as_many_as_officially(path: Path) -> None:
    tensors, config = read(path)
    column = {title: number for number, title in enumerate(config["columns"])}
    for row, ratio in zip(tensors["counts"].tolist(), tensors["ratios"].tolist(), strict=True):
        grid = TokenGrid(*row[:3])
        seen = {kind: mask_named(kind).count(grid, ratio) for kind in ("semantic", "random", "tube")}
        assert seen["semantic"] == grid.frames * row[column["attention: visible per frame"]]
        assert seen["random"] == grid.size - row[column["random: masked in all"]]
        assert seen["tube"] == grid.size - row[column["tube: masked in all"]]
        assert num_visible(grid.per_frame, ratio) == grid.per_frame - row[column["tube: masked per frame"]]
        for kind, drawn in (("random", grid.size), ("tube", grid.per_frame)):
            if drawn > MAX_SCORES:
                with pytest.raises(ValueError, match=f"{drawn} tokens"):
                    mask_named(kind).draw(2, grid, ratio, torch.tensor([7]))
                continue
            visible = mask_named(kind).draw(2, grid, ratio, torch.tensor([7])).long()
            assert visible.shape == (2, seen[kind]) and all(len(set(clip)) == seen[kind] for clip in visible.tolist())
            if kind == "tube":
                where = visible.view(2, grid.frames, -1) % grid.per_frame
                assert (where == where[:, :1]).all()
