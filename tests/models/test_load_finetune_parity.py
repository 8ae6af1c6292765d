"""Starting a classifier from another file, against what official fine-tuning loads: all cases of all load_finetune_* files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.parity_files import parity_files, read_case
from umt_fast.config import VitConfig
from umt_fast.masking import TokenGrid
from umt_fast.models.classifier import Classifier
from umt_fast.models.weights import WeightsError
from umt_fast.models.weights.finetune import K710_CLASSES, resized_positions, start_classifier

Case = dict[str, Any]


def cases() -> list:
    found = []
    for path in parity_files("load_finetune"):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        found += [pytest.param(path, case, id=f"{path.stem}-{case['case']}") for case in config["cases"]]
    return found


def classifier_of(config: dict[str, Any], case: Case) -> Classifier:
    """A model of the case's sizes; its parameters are all different from any of the file's."""
    tubelet = config.get("tubelet", 1)
    vit = VitConfig(
        width=config["dim"],
        depth=config["depth"],
        num_heads=1,
        image_size=case["image"],
        num_frames=case["frames"],
        tubelet_size=tubelet,
        drop_path=0.0,
        position_grid=(8 // tubelet, 14, 14),
    )
    return Classifier(vit, case["classes"])


def file_of(config: dict[str, Any], case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random tensors under the names that the case's file has, of a head of as many classes as its name says."""
    generator = torch.Generator().manual_seed(1)
    classes = K710_CLASSES if "k710" in case["case"] or case["classes"] == 400 else case["classes"]
    own = classifier_of(config, case | {"classes": classes}).state_dict()
    shapes = {name: value.shape for name, value in own.items()}
    shapes |= {f"norm.{kind}": (config["dim"],) for kind in ("weight", "bias")}
    shapes |= {f"clip_decoder.{i}.head.{kind}": (3,) for i in range(2) for kind in ("weight", "bias")}
    state = {}
    for pattern in case["file_keys"]:
        name = pattern.removeprefix("encoder.").removeprefix("backbone.")
        prefix = pattern[: len(pattern) - len(name)]
        for key in matching(name, shapes):
            state[prefix + key] = torch.randn(shapes[key], generator=generator)
        if name == "pos_embed":
            stored = tensors.get(f"{case['case']}.in.pos_embed")
            if stored is None:
                frames = int(re.match(r"(\d+)_frames_into", case["case"])[1])
                stored = torch.randn(
                    1, frames // config.get("tubelet", 1) * 14 * 14, config["dim"], generator=generator
                )
            state[prefix + name] = stored
    assert state
    return state


def matching(pattern: str, names: Any) -> set[str]:
    """The names that a pattern of the file stands for: `blocks.{i}.*` is every parameter of every block."""
    written = re.escape(pattern).replace(r"\{i\}", r"\d+").replace(r"\*", ".*")
    return {name for name in names if re.fullmatch(written, name)}


def map_of(config: dict[str, Any], classes: int) -> list[int]:
    """The made-up label map that the file's text describes."""
    factor, offset, rows = map(int, re.search(r"\((\d+)\*i \+ (\d+)\) mod (\d+)", config["label_map"]).groups())
    return [(factor * i + offset) % rows for i in range(classes)]


def written(
    config: dict[str, Any], case: Case, state: dict[str, torch.Tensor], folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The case's file, and our options for it."""
    path = folder / "file.pth"
    torch.save({case["wrapped_in"]: state} if case["wrapped_in"] else state, path)
    options: dict[str, Any] = {"delete_head": "--delete_head" in case["options"]}
    if case.get("head_rows", {}).get("equals_label_map"):
        options["label_map"] = folder / "label_map.json"
        options["label_map"].write_text(json.dumps(map_of(config, case["classes"])))
    return path, options


@pytest.mark.parametrize(("path", "case"), cases())
def test_what_is_loaded_parity(path: Path, case: Case, tmp_path: Path) -> None:
    """The same keys are used, missing and unknown. Where the official code is silent about a wrong shape, ours refuses."""
    config, tensors = read_case(path)
    model, state = classifier_of(config, case), file_of(config, case, tensors)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file, options = written(config, case, state, tmp_path)
    if case["wrong_shape"]:
        with pytest.raises(
            WeightsError, match=f"head of {K710_CLASSES} classes and the model one of {case['classes']}"
        ):
            start_classifier(model, file, **options)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return
    if case["error"]:
        check_where_the_official_code_fails(model, file, state, options)
        return
    started = start_classifier(model, file, **options)
    own = {key: value for key, value in model.state_dict().items()}
    for kind, patterns, ours in (
        ("used", case["used"], started.used),
        # A parameter of the official model alone, where it is not in the file: constant, and built anew like ours.
        ("missing", [name for name in case["missing"] if name != "pos_embed"], started.fresh),
        (
            "unexpected",
            case["unexpected"],
            [key for key in started.unused if not options["delete_head"] or "head" not in key],
        ),
    ):
        names = [*own, *started.unused, *started.used]
        assert set(ours) == {name for pattern in patterns for name in matching(pattern, names)}, kind
        assert all(matching(pattern, ours) for pattern in patterns), kind
    renamed = {key.removeprefix("encoder.").removeprefix("backbone."): value for key, value in state.items()}
    for key in own:
        if key in started.fresh:
            assert torch.equal(own[key], before[key]), key
        elif not key.startswith("head."):
            assert torch.equal(own[key], renamed[key]), key
    check_head(config, case, own, renamed)
    check_positions(case, model, started.used, tensors)


def check_head(
    config: dict[str, Any], case: Case, own: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]
) -> None:
    rows = case.get("head_rows")
    if rows is None:
        return
    first, count = rows["first"], rows["count"]
    wanted = map_of(config, count) if rows["equals_label_map"] else list(range(first, first + count))
    assert (wanted == list(range(count))) == rows["identity"]
    for key in ("head.weight", "head.bias"):
        assert torch.equal(own[key], torch.stack([stored[key][row] for row in wanted])), key


def check_positions(case: Case, model: Classifier, used: list[str], tensors: dict[str, torch.Tensor]) -> None:
    table = tensors.get(f"{case['case']}.out.pos_embed")
    built = classifier_of({"dim": model.position.shape[1], "depth": 1}, case).position
    if table is None or "pos_embed" not in used:
        assert torch.equal(model.position, built)
    else:
        torch.testing.assert_close(model.position, table[0], rtol=1e-5, atol=1e-6)


def check_where_the_official_code_fails(
    model: Classifier, file: Path, state: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    """A table of the model's own length needs no resizing, so ours takes it; any other is refused in one line."""
    table = state["pos_embed"]
    if table.shape[1] == model.grid.size:
        assert "pos_embed" in start_classifier(model, file, **options).used
        assert torch.equal(model.position, table[0])
    else:
        with pytest.raises(WeightsError, match=f"position table has {table.shape[1]} rows"):
            start_classifier(model, file, **options)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in parity_files("load_finetune")])
def test_resized_position_tables_parity(path: Path) -> None:
    """Every stored table, also where the official model has no place for the result."""
    config, tensors = read_case(path)
    found = 0
    for case in config["cases"]:
        table, wanted = (tensors.get(f"{case['case']}.{side}.pos_embed") for side in ("in", "out"))
        if table is None or wanted is None:
            continue
        tubelet = config.get("tubelet", 1)
        grid = TokenGrid(case["frames"] // tubelet, case["image"] // 16, case["image"] // 16)
        torch.testing.assert_close(resized_positions(table, grid, tubelet), wanted[0], rtol=1e-5, atol=1e-6)
        found += 1
    assert found
