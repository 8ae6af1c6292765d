"""Descriptions of models in checkpoints: rebuilt from them alone, from older records, from names and tensors."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from umt_fast import recipe
from umt_fast.config import ConfigError, VitConfig
from umt_fast.models.classifier import Classifier
from umt_fast.models.description import MODELS, complete, found_in, text_config, vit_config
from umt_fast.models.video_text import VideoText
from umt_fast.tasks import task_of

ASSETS = Path(__file__).resolve().parents[1] / "assets"
# What checkpoints held under `config` before they held descriptions.
RECORDS = json.loads((ASSETS / "config_records.json").read_text())


@pytest.mark.parametrize("name", ["tiny", "classes", "captions"])
def test_a_description_is_plain_and_holds_nothing_of_the_run(name: str) -> None:
    config = recipe.load(f"{ASSETS}/tiny.py:{name}")
    described = task_of(config).describe(config)
    assert json.loads(json.dumps(described)) == described
    config.run.out, config.run.batch_size, config.optim.lr, config.data.train = "elsewhere", 99, 0.5, "a.csv"
    config.student.drop_path, config.student.checkpoint_blocks = 0.3, 1
    assert task_of(config).describe(config) == described
    config.student.num_frames = 8
    assert task_of(config).describe(config) != described


@pytest.mark.parametrize("name", ["tiny", "classes", "captions"])
def test_records_of_older_checkpoints_mean_the_same(name: str) -> None:
    record = RECORDS[name]
    config = recipe.load(f"{ASSETS}/tiny.py:{name}")
    # They had the clip's own table, which records of today may leave unsaid.
    expected = task_of(config).describe(config)
    expected["vit"]["position_grid"] = list(config.student.grid)
    assert found_in({"config": record}, "x.pt") == expected
    # Options come and go: what is not of the model is not read.
    record = record | {
        "since_removed": 1,
        "run": {"dtype": record["run"]["dtype"], "gone": 2},
        "optim": {},
        "data": None,
    }
    assert found_in({"config": record}, "x.pt") == expected
    # The description counts where there are both.
    assert found_in({"config": RECORDS["tiny"], "model_config": expected}, "x.pt") == expected


def test_what_describes_nothing() -> None:
    for rest in ({}, {"config": {"model": {"vit": "b16"}, "lr": 1e-4}}, {"config": [1]}, {"epoch": 3}):
        assert found_in(rest, "x.pt") is None
    with pytest.raises(ConfigError, match="x.pt: model_config is damaged: vit must have exactly width"):
        found_in({"model_config": {"task": "video_text", "version": 1, "vit": {"width": 3}}}, "x.pt")
    with pytest.raises(ConfigError, match="x.pt describes its model in version 2, and this umt_fast reads version 1"):
        found_in({"model_config": {"task": "video_text", "version": 2}}, "x.pt")


@pytest.mark.parametrize(("name", "layers"), [("umt_b16", 6), ("umt_l16", 4)])
def test_a_video_text_model_by_name(name: str, layers: int) -> None:
    config = recipe.load(f"stage2:{name[4:]}")
    with torch.device("meta"):
        built = VideoText(config.student, config.text, num_layers=layers, output_dim=77, embed_dim=33)
    described = complete(MODELS[name](), built.state_dict(), "x.pth")
    wanted = task_of(config).describe(config) | {
        "num_layers": layers,
        "output_dim": 77,
        "embed_dim": 33,
        "dtype": "fp32",
    }
    assert described == wanted
    with torch.device("meta"):
        again = VideoText(vit_config(described), text_config(described), num_layers=layers, output_dim=77, embed_dim=33)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (built, again)]
    assert shapes[0] == shapes[1]


def classifier_state(tokens: int | None) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = Classifier(VitConfig(), 339).state_dict()
        return state if tokens is None else state | {"pos_embed": torch.empty(1, tokens, 768)}


@pytest.mark.parametrize(
    ("tokens", "given", "expected"),
    [
        (None, {}, (8, 224)),
        (None, {"num_frames": 12}, (12, 224)),
        (1568, {}, (8, 224)),
        (3136, {}, (16, 224)),
        (4608, {}, (8, 384)),
        (9216, {}, (16, 384)),
        (3136, {"num_frames": 16}, (16, 224)),
        (4608, {"image_size": 384}, (8, 384)),
        (784, {"num_frames": 4}, (4, 224)),
        (784, {}, None),
        (3136, {"image_size": 384}, None),
    ],
)
def test_a_classifier_by_name(tokens: int | None, given: dict, expected: tuple[int, int] | None) -> None:
    template = MODELS["umt_b16_ft"]()
    template["vit"] |= given
    if expected is None:
        with pytest.raises(
            ConfigError, match=f"x.pth has a position table of {tokens} tokens.*--num_frames and --image_size"
        ):
            complete(template, classifier_state(tokens), "x.pth")
        return
    described = complete(template, classifier_state(tokens), "x.pth")
    vit = vit_config(described)
    assert (vit.num_frames, vit.image_size) == expected and described["num_classes"] == 339
    assert vit.position_grid == (8, 14, 14) and MODELS["umt_b16_ft"]()["num_classes"] is None


def test_official_position_tables_are_told_apart(shared: Path) -> None:
    """The tables that official files hold, by the published cases; and what the official code makes of ours at that size."""
    from safetensors import safe_open

    with safe_open(shared / "parity" / "load_finetune_a.safetensors", "pt") as file:
        cases = {case["case"]: case for case in json.loads(file.metadata()["config"])["cases"]}
        for name in ("384_into_384", "384_into_224"):
            case = cases["384_into_384"]
            table = file.get_tensor(f"{name}.in.pos_embed")
            state = {"pos_embed": table, "head.weight": torch.empty(10, 4)}
            vit = complete(MODELS["umt_b16_ft"](), state, name)["vit"]
            assert (vit["num_frames"], vit["image_size"]) == (case["frames"], case["image"])


def test_a_file_that_is_not_of_the_named_model() -> None:
    with pytest.raises(ConfigError, match="x.pth has no vision_proj.weight, so it is no file of this --model"):
        complete(MODELS["umt_b16"](), classifier_state(None), "x.pth")
