"""The plain fine-tuning step against the official files, and the fast one against it: logits, loss, every gradient, groups."""

import json

import numpy as np
import pytest
import torch

from tests.parity_files import parity_files, read_case, relative, tower_of
from umt_fast.__main__ import main
from umt_fast.bench.finetune import finetune_config, flops_of, normalized
from umt_fast.config import ConfigError
from umt_fast.engine.optim import parameter_groups
from umt_fast.reference.finetune import (
    PlainClassifier,
    layered_optimizer,
    mix_in_place,
    mixed_targets,
    soft_target_loss,
)
from umt_fast.tasks.classification import Classification, Supervised
from umt_fast.tasks.mixing import mixed, soft_targets

CUT, ADDED = (0.75, (4, 36, 8, 40)), (0.3, (0, 0, 0, 0))


@pytest.mark.parametrize("path", parity_files("finetune"), ids=lambda path: path.stem)
def test_plain_logits_and_gradients_are_the_official_ones(path) -> None:
    sizes, tensors = read_case(path)
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    table = state.pop("pos_embed", None)
    plain = PlainClassifier(tower_of(sizes), sizes["classes"]).eval()
    plain.load_state_dict(state)
    if table is not None:
        assert relative(plain.position, table) < 1e-6
    logits = plain(tensors["in.video"])
    loss = soft_target_loss(logits, tensors["in.soft_targets"])
    loss.backward()
    assert relative(logits.detach(), tensors["out.logits"]) < 1e-4
    assert relative(loss.detach().view(1), tensors["out.loss"]) < 1e-4
    own = dict(plain.named_parameters())
    given = {
        key.removeprefix("grad.").removeprefix("model."): v for key, v in tensors.items() if key.startswith("grad.")
    }
    assert own.keys() == given.keys()
    assert max(relative(own[key].grad, value) for key, value in given.items()) < 1e-4


@pytest.mark.parametrize(("share", "box"), [CUT, ADDED], ids=["cutmix", "mixup"])
def test_implementations_agree_on_a_step(share: float, box: tuple[int, int, int, int]) -> None:
    """16 frames, so that the table is stretched, and recomputed blocks in both."""
    torch.manual_seed(0)
    config = finetune_config("tiny", 4, "fp32", frames=16, checkpoint_blocks=2)
    config.head_scale = 1.0  # else all gradients below the head are tiny
    config.student.drop_path = 0.0
    fast, plain = Supervised(config), PlainClassifier(config.student, config.num_classes)
    plain.load_state_dict(fast.classifier.state_dict())
    (batch,) = Classification().random_batches(config)
    del batch["erase_box"]
    pixels = normalized(batch["video"])
    batch |= {"mix_share": torch.full((4,), share), "mix_box": torch.tensor([box]).expand(4, 4)}
    found = fast(batch, torch.tensor([1]))["loss"]
    found.backward()
    mix_in_place(pixels, share, box)
    loss = soft_target_loss(plain(pixels), mixed_targets(batch["label"], config.num_classes, share, 0.1))
    loss.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    expected = dict(plain.named_parameters())
    for name, parameter in fast.classifier.named_parameters():
        assert relative(parameter.grad, expected[name].grad) < 1e-4, name


@pytest.mark.parametrize(("share", "box"), [CUT, ADDED], ids=["cutmix", "mixup"])
def test_mixing_is_the_fast_ones(share: float, box: tuple[int, int, int, int]) -> None:
    video, label = torch.randn(3, 3, 2, 48, 48), torch.tensor([2, 0, 1])
    shares, boxes = torch.full((3,), share), torch.tensor([box]).expand(3, 4)
    wanted = mixed(video, shares, boxes)
    mix_in_place(video, share, box)
    torch.testing.assert_close(video, wanted)
    torch.testing.assert_close(mixed_targets(label, 5, share, 0.1), soft_targets(label, 5, shares, 0.1))


def test_groups_are_those_of_the_fast_optimizer() -> None:
    config = finetune_config("tiny", 2, "fp32")
    fast, plain = Supervised(config), PlainClassifier(config.student, config.num_classes)

    def told(groups: list[dict], names: dict[int, str]) -> dict[str, tuple[float, float]]:
        return {names[id(p)]: (round(g["lr_scale"], 12), g["weight_decay"]) for g in groups for p in g["params"]}

    groups = parameter_groups(fast.trainable, config.optim, fast.layer_id, config.student.depth + 1)
    ours = told(groups, {id(p): name for name, p in fast.trainable.named_parameters()})
    theirs = layered_optimizer(plain, config.optim).param_groups
    assert told(theirs, {id(p): name for name, p in plain.named_parameters()}) == ours
    assert len({scale for scale, _ in ours.values()}) == config.student.depth + 2


@pytest.mark.parametrize("implementation", ["fast", "plain"])
def test_bench_reports_what_it_measured(implementation: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "finetune", "--model", "tiny", "--batch_size", "2", "--device", "cpu", "--dtype", "fp32"]
    arguments += ["--steps", "1", "--frames", "16", "--image_size", "96", "--checkpoint_blocks", "1"]
    assert main([*arguments, "--implementation", implementation]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bench"], found["frames"], found["image_size"], found["checkpoint_blocks"]) == ("finetune", 16, 96, 1)
    assert sum(found["ms_per_part"].values()) > 0 and found["peak_memory_gib"] > 0
    # The TFLOP/s shown must follow from the clips/s shown, counted for these frames and pixels.
    config = finetune_config("tiny", 2, "fp32", 16, 96, 1)
    tokens, span, width = 16 * 36, 16 * 36, 96
    blocks = 4 * tokens * (8 * width**2 + 4 * width * 4 * width + 4 * span * width)
    assert flops_of(config) == pytest.approx(3 * blocks + 2 * tokens * width * 3 * 16**2 * 2)
    assert found["tflops"] == pytest.approx(found["clips_per_s"] * flops_of(config) / 1e12, rel=2e-2, abs=1e-4)


def test_sizes_that_do_not_exist_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "finetune", "--model", "tiny", "--device", "cpu"]
    assert main([*arguments, "--image_size", "100"]) == 2
    assert "image_size 100 is not a multiple of" in capsys.readouterr().err
    assert main([*arguments, "--frames", "0"]) == 2
    assert "frames is 0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="checkpoint_blocks is 5"):
        finetune_config("tiny", 2, "fp32", checkpoint_blocks=5)
    assert np.isclose(finetune_config("l16", 2, "bf16").optim.layer_decay, 0.85)
