"""RandAugment and random erasing against what the official implementation drew and computed, file by file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.parity_files import cases_or_skip, read_case
from umt_fast.config import ConfigError
from umt_fast.data.decode import erasing, rand_augment


def pictures(frames: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames.numpy()]


@pytest.mark.parametrize("path", cases_or_skip("randaugment"))
def test_operations_parity(path: Path) -> None:
    config, tensors = read_case(path)
    (image,) = pictures(tensors["in.image"][None])
    outputs = {key: value for key, value in tensors.items() if key.startswith("out.")}
    assert outputs
    for key, wanted in outputs.items():
        name, sign = key.split(".")[1], key.split(".")[-1]
        level = float(".".join(key.split(".")[2:-1]))
        argument = rand_augment.argument_of(name, level, sign == "negative")
        expected = config["arguments"][key]
        assert argument == (expected if expected is None else pytest.approx(expected, abs=1e-12)), key
        assert np.array_equal(np.asarray(rand_augment.apply(name, image, expected)), wanted.numpy()), key


@pytest.mark.parametrize("path", cases_or_skip("randaugment"))
def test_arguments_at_every_level_parity(path: Path) -> None:
    config, _ = read_case(path)
    assert {operation["name"] for operation in config["operations"]} == set(rand_augment.OPERATIONS)
    for operation in config["operations"]:
        name, ours = operation["name"], rand_augment.OPERATIONS[operation["name"]]
        assert ours.signed == operation["sign_randomised"], name
        for negative, table in ((False, "argument_at_levels"), (True, "argument_if_negated")):
            if operation[table] is None:
                continue
            found = [rand_augment.argument_of(name, level, negative) for level in config["levels"]]
            assert found == pytest.approx(operation[table], abs=1e-12), (name, negative)
            assert not operation["integer"] or all(value == int(value) for value in found)


@pytest.mark.parametrize("path", cases_or_skip("randaugment"))
def test_whole_policy_parity(path: Path) -> None:
    config, tensors = read_case(path)
    frames = pictures(tensors["clip.in"])
    for number, draws in enumerate(config["clip_runs"]):
        drawn = [(draw["name"], draw["argument"]) for draw in draws if draw["applied"]]
        found = np.stack([np.asarray(frame) for frame in rand_augment.augment(frames, drawn)])
        assert np.array_equal(found, tensors[f"clip.out.{number}"].numpy()), draws


@pytest.mark.parametrize("path", cases_or_skip("randaugment"))
def test_draws_of_the_policy_parity(path: Path) -> None:
    config, _ = read_case(path)
    policy = rand_augment.Policy.parse(config["policy"])
    assert (policy.count, policy.probability) == (config["draws_per_clip"], config["applied_with_probability"])
    rng, counts, levels, negative, clips = np.random.default_rng(3), {}, [], 0, 4000
    for _ in range(clips):
        for name, argument in policy.draw(rng):
            counts[name] = counts.get(name, 0) + 1
            if name == "Rotate":
                levels.append(abs(argument) / 3)
                negative += argument < 0
    expected = clips * policy.count * policy.probability / len(rand_augment.OPERATIONS)
    assert set(counts) == set(rand_augment.OPERATIONS)
    # Binomial: five deviations.
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values()), counts
    assert np.mean(levels) == pytest.approx(7, abs=0.15) and np.std(levels) == pytest.approx(0.5, abs=0.08)
    assert abs(negative - len(levels) / 2) < 2.5 * len(levels) ** 0.5


@pytest.mark.parametrize("text", ["rand-m7-n4-mstd0.5", "rand-m11-inc1", "augmix-m3", "rand-m7-w0-inc1", ""])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="RandAugment"):
        rand_augment.Policy.parse(text)


def test_a_policy_without_numbers_has_the_strongest_level() -> None:
    assert rand_augment.Policy.parse("rand-inc1") == rand_augment.Policy(10, 0, 2)


@pytest.mark.parametrize("path", cases_or_skip("erasing"))
def test_erased_boxes_parity(path: Path) -> None:
    config, tensors = read_case(path)
    for number, run in enumerate(config["runs"]):
        before, after = tensors[f"{number}.in"], tensors[f"{number}.out"]
        box = torch.tensor([run["box_top_left_h_w"]])
        # The noise is what the official code drew: inside the box the clip is it, outside as before.
        found = erasing.erased(before.transpose(0, 1)[None], box, after.transpose(0, 1)[None])[0].transpose(0, 1)
        assert torch.equal(found, after)
        zeros = erasing.erased(
            before.transpose(0, 1)[None], box, torch.zeros(1, 3, *before.shape[::2][:1], *before.shape[2:])
        )
        top, left, tall, wide = run["box_top_left_h_w"]
        assert (zeros == 0).sum() == 3 * before.shape[0] * tall * wide
        assert (zeros[0, :, :, top : top + tall, left : left + wide] == 0).all()


@pytest.mark.parametrize("path", cases_or_skip("erasing"))
def test_boxes_are_distributed_as_officially_parity(path: Path) -> None:
    config, _ = read_case(path)
    statistics = config["statistics"]
    height, width = statistics["size"]
    rng = np.random.default_rng(5)
    drawn = np.array([erasing.draw_box(height, width, config["probability"], rng) for _ in range(statistics["draws"])])
    boxes = drawn[drawn[:, 2] > 0]
    assert len(boxes) / len(drawn) == pytest.approx(config["probability"], abs=0.015)
    area, aspect = boxes[:, 2] * boxes[:, 3] / (height * width), boxes[:, 2] / boxes[:, 3]
    inner = slice(1, -1)  # the ends are extreme values
    for values, name in ((area, "area"), (aspect, "aspect")):
        found = np.quantile(values, statistics["quantiles"])
        assert found[inner] == pytest.approx(statistics[name][inner], rel=0.06), name
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    # Uniform over all places, both ends included.
    place = boxes[:, :2] / np.maximum(1, (height, width) - boxes[:, 2:])
    assert place.mean(0) == pytest.approx(0.5, abs=0.02) and place.min() == 0 and place.max() == 1


def test_nothing_is_erased_at_probability_zero_nor_by_an_empty_box() -> None:
    rng = np.random.default_rng(0)
    assert all(erasing.draw_box(8, 8, 0.0, rng) == (0, 0, 0, 0) for _ in range(50))
    video = torch.randn(2, 3, 2, 4, 4)
    assert torch.equal(erasing.erased(video, torch.zeros(2, 4, dtype=torch.int64), torch.full_like(video, 9)), video)
