"""Our detector and its loss against what the official implementation computed from the same weights.

Every `ava_*.safetensors` is a case; sizes and options come from its metadata.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.parity_files import parity_files, relative
from umt_fast.config import VitConfig
from umt_fast.data.decode import boxes as moves
from umt_fast.models.detector import RoiRule
from umt_fast.models.weights import fit
from umt_fast.tasks.detection import Detection

pytest.importorskip("torchvision", reason="the detector needs torchvision")
LIMIT = 1e-4


class Case:
    """One file: its tensors, and our objective filled with its weights."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        sizes, roi = self.config, self.config["roi"]
        rows, columns = sizes["table_grid"]
        assert rows == columns
        tubelet = sizes.get("tubelet", 1)
        vit = VitConfig(
            width=sizes["dim"],
            depth=sizes["depth"],
            num_heads=sizes["heads"],
            patch_size=sizes["patch"],
            tubelet_size=tubelet,
            image_size=rows * sizes["patch"],
            num_frames=sizes["t"],
            drop_path=0.0,
        )
        self.objective = Detection(vit, num_classes=sizes["classes"], bf16=False).eval()
        self.detector = self.objective.detector
        self.detector.roi = RoiRule(tuple(roi["output"]), roi["spatial_scale"], roi["sampling_ratio"], roi["aligned"])
        state = {k.removeprefix("model."): v for k, v in self.tensors.items() if k.startswith("model.")}
        fit(self.detector, state, str(path))

    def batch(self, boxes: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"video": self.tensors["in.video"], "boxes": boxes, "box_clip": self.tensors["in.box_clip"], **more}

    def extended(self) -> torch.Tensor:
        """The detected boxes, each within its own clip's picture."""
        share, boxes = tuple(self.config["test_extension"]), self.tensors["in.boxes"].clone()
        for clip, (height, width) in enumerate(self.tensors["in.sizes"].tolist()):
            mine = self.tensors["in.box_clip"] == clip
            boxes[mine] = moves.extended(boxes[mine], (width, height), share)
        return boxes


@pytest.fixture(scope="module", params=parity_files("ava"), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_parity_of_features_and_regions(case: Case) -> None:
    boxes = case.extended()
    torch.testing.assert_close(boxes, case.tensors["out.test_boxes"], rtol=0, atol=1e-4)
    with torch.no_grad():
        maps = case.detector.feature_map(case.tensors["in.video"])
        bins = case.detector.pooled(maps, boxes, case.tensors["in.box_clip"])
        trained = case.detector.pooled(maps, case.tensors["in.train_boxes"], case.tensors["in.box_clip"]).amax((2, 3))
    assert relative(maps, case.tensors["out.feature_map"]) < LIMIT
    assert relative(bins, case.tensors["out.test_roi"]) < LIMIT
    assert relative(trained, case.tensors["out.train_roi_max"]) < LIMIT


def test_parity_of_logits_and_scores(case: Case) -> None:
    with torch.no_grad():
        tested = case.batch(case.extended(), scores=case.tensors["in.box_scores"].flatten())
        logits, scores = case.objective.logits(tested), case.objective.scores(tested)
        trained = case.objective.logits(case.batch(case.tensors["in.train_boxes"]))
    assert relative(logits, case.tensors["out.test_logits"]) < LIMIT
    assert relative(scores, case.tensors["out.test_scores"]) < LIMIT
    assert relative(trained, case.tensors["out.train_logits"]) < LIMIT


@pytest.mark.parametrize("filled", [0, 5])
def test_parity_of_loss_and_every_gradient(case: Case, filled: int) -> None:
    """Also where rows without boxes fill the batch up: they neither count nor give gradients."""
    count = len(case.tensors["in.train_boxes"])
    batch = case.batch(case.tensors["in.train_boxes"], labels=case.tensors["in.labels"])
    for name in ("boxes", "box_clip", "labels"):
        batch[name] = torch.cat([batch[name], batch[name].new_zeros(filled, *batch[name].shape[1:])])
    batch["box_valid"] = torch.arange(count + filled) < count
    case.detector.zero_grad()
    loss = case.objective(batch, torch.tensor([1]))["loss"]
    loss.backward()
    assert relative(loss.detach().view(1), case.tensors["out.loss"]) < LIMIT
    theirs = {key.removeprefix("grad."): value for key, value in case.tensors.items() if key.startswith("grad.")}
    theirs = {key.removeprefix("model."): value for key, value in theirs.items()}
    ours = {key: parameter.grad for key, parameter in case.detector.named_parameters()}
    assert set(ours) == set(theirs)
    worst = {key: relative(ours[key], value) for key, value in theirs.items()}
    assert max(worst.values()) < LIMIT, sorted(worst.items(), key=lambda item: -item[1])[:5]
