"""Which entry of a stage-2 file each tensor of a downstream model starts from: `load_downstream_*` of parity_files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.parity_files import parity_files, read_case
from umt_fast.config import OptimConfig, TextConfig, VitConfig
from umt_fast.engine.optim import parameter_groups
from umt_fast.models.downstream import QuestionModel, RetrievalModel
from umt_fast.models.video_text import VideoText
from umt_fast.models.weights import WeightsError, save_state
from umt_fast.models.weights.downstream import load_question, load_retrieval, same_sources, stage2_sources

CASES = parity_files("load_downstream")


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> dict:
    return read_case(request.param)[0]


def sizes(config: dict, keys: list[str], width: int = 8) -> tuple[VitConfig, TextConfig]:
    """A model of as many blocks and layers as the file's, small otherwise."""
    depth = 1 + max(int(key.split(".")[3]) for key in keys if key.startswith("vision_encoder.encoder.blocks."))
    vit = VitConfig(width=width, depth=depth, num_heads=2, patch_size=8, image_size=16, num_frames=2, drop_path=0.0)
    text = TextConfig(
        width=8, depth=config["layers"], fusion_layer=config["fusion"], num_heads=2, vocab_size=20, max_positions=8
    )
    return vit, text


def model_of(name: str, config: dict) -> nn.Module:
    vit, text = sizes(config, config["file_keys"])
    return QuestionModel(vit, text) if name == "qa" else RetrievalModel(vit, text, embed_dim=4)


def heads_of(keys: list[str]) -> int:
    """Alignment heads that a file has."""
    return len({key.split(".")[2] for key in keys if key.startswith("vision_encoder.clip_decoder.")})


def stage2_state(config: dict, width: int = 8) -> dict[str, Tensor]:
    """A stage-2 file's tensors, every one different, with a piece of a teacher."""
    torch.manual_seed(5)
    vit, text = sizes(config, config["file_keys"], width)
    model = VideoText(vit, text, num_layers=heads_of(config["file_keys"]), output_dim=6, embed_dim=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) * 0.2)
    return {key: value.clone() for key, value in model.state_dict().items()} | {"clip_teacher.proj": torch.zeros(2)}


def test_a_case_is_found() -> None:
    assert CASES


def test_parity_of_sources_missing_and_unexpected(config: dict) -> None:
    assert config["models"]
    for name, expected in config["models"].items():
        keys = list(model_of(name, config).state_dict())
        if name == "retrieval_evaluate":  # the official code takes such a file for a fine-tuned one, by an option
            found = same_sources(keys, config["file_keys"])
            # It tells by values: our constant is in the file under another name.
            constant = {key: value for key, value in expected["taken"].items() if key.endswith("position_ids")}
            assert found.taken | constant == expected["taken"], name
        else:
            found = stage2_sources(keys, config["file_keys"], fusion_layer=config["fusion"])
            assert found.taken == expected["taken"], name
        assert sorted(found.missing) == sorted(expected["missing"]), name
        assert found.unexpected == sorted(expected["unexpected"]), name


def test_parity_of_weight_decay(config: dict) -> None:
    for name, expected in config["weight_decay"].items():
        model = model_of(name, config)
        names = {parameter: key for key, parameter in model.named_parameters()}
        rate = max(expected.values())
        found = {
            names[parameter]: group["weight_decay"]
            for group in parameter_groups(model, OptimConfig(weight_decay=rate))
            for parameter in group["params"]
        }
        assert found == expected, name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_parity_of_tensors_from_an_official_file(config: dict, tmp_path: Path, suffix: str) -> None:
    """Each tensor of the model is the file's that the official code takes; without second names of tied tensors too."""
    state, path = stage2_state(config), tmp_path / f"stage2{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        save_file({key: value for key, value in state.items() if ".predictions.decoder." not in key}, path)
    for name, load in (("retrieval", load_retrieval), ("qa", load_question)):
        model = model_of(name, config)
        load(model, path)
        own = model.state_dict()
        for key, source in config["models"][name]["taken"].items():
            assert torch.equal(own[key], state[source]), key
        # Out again, in again, exactly; a tied tensor under one name is enough.
        saved = tmp_path / f"{name}{suffix}"
        save_state(own, saved)
        again = model_of(name, config)
        load(again, saved)
        assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
        bare = {
            key: value for key, value in own.items() if not key.endswith(("position_ids", "predictions.decoder.weight"))
        }
        torch.save(bare, tmp_path / "bare.pth")
        again = model_of(name, config)
        load(again, tmp_path / "bare.pth")
        assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())


def test_files_that_do_not_fit_are_named(config: dict, tmp_path: Path) -> None:
    state = stage2_state(config)

    def written(content: dict[str, Tensor]) -> Path:
        torch.save(content, tmp_path / "file.pth")
        return tmp_path / "file.pth"

    retrieval, question = model_of("retrieval", config), model_of("qa", config)
    with pytest.raises(WeightsError, match=r"missing: itm_head\.weight"):
        load_retrieval(retrieval, written({key: value for key, value in state.items() if key != "itm_head.weight"}))
    with pytest.raises(WeightsError, match="not known to the model: surplus"):
        load_question(question, written(state | {"surplus": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="holds stage-1 weights"):
        load_retrieval(retrieval, written({"encoder.patch_embed.proj.weight": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="fine-tuned for retrieval and has no answer decoder"):
        load_question(question, written(retrieval.state_dict()))
    with pytest.raises(
        WeightsError, match="holds question-answering weights .* retrieval starts from stage-2 or downstream"
    ):
        load_retrieval(
            retrieval,
            written(
                question.state_dict()
                | {key: value for key, value in retrieval.state_dict().items() if key not in question.state_dict()}
            ),
        )
    vit, text = sizes(config, config["file_keys"], width=16)
    with pytest.raises(WeightsError, match="tokens of width 16, the decoder reads text of width 8"):
        load_question(QuestionModel(vit, text), written(stage2_state(config, width=16)))
