"""Action detection where the parity files do not reach: batches without boxes, whole runs, ranks, files, weights."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.videos import write_video
from umt_fast.config import VitConfig
from umt_fast.data.decode import detection_view as views
from umt_fast.data.decode.detection_clip import SecondFiles, Temporal
from umt_fast.data.errors import DataError
from umt_fast.data.sources import detections
from umt_fast.models.weights import WeightsError, load_detector, save_state
from umt_fast.tasks import detected, detection, frame_map

pytest.importorskip("torchvision", reason="the detector needs torchvision")


def small(**options: object) -> detection.Detection:
    vit = VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=2, drop_path=0.0)
    return detection.Detection(vit, **{"num_classes": 5, "head_scale": 1.0, "bf16": False} | options)


def batch_of(boxes: int, filled: int = 0, size: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(boxes)
    corners = torch.rand(boxes, 4, generator=generator) * 15
    corners[:, 2:] += 16
    rows = boxes + filled
    batch = {
        "index": torch.tensor([0, 1]),
        "video": torch.randint(0, 256, (2, 2, *size, 3), dtype=torch.uint8, generator=generator),
        "sizes": torch.tensor([size, (size[0] - 9, size[1] - 5)]),
        "boxes": torch.cat([corners, torch.zeros(filled, 4)]),
        "box_clip": torch.cat([torch.arange(boxes) % 2, torch.zeros(filled, dtype=torch.int64)]),
        "box_valid": torch.arange(rows) < boxes,
        "labels": torch.rand(rows, 5, generator=generator) < 0.3,
        "scores": torch.rand(rows, generator=generator),
    }
    return batch


SEED = torch.tensor([1])


def test_a_batch_without_boxes_has_no_loss_and_finite_gradients() -> None:
    for filled in (0, 3):
        objective = small()
        loss = objective(batch_of(0, filled), SEED)["loss"]
        loss.backward()
        assert loss.item() == 0
        gradients = [p.grad for p in objective.trainable.parameters()]
        assert all(g is not None and not g.any() for g in gradients)


def test_the_official_mean_times_the_number_of_boxes() -> None:
    objective, batch = small(), batch_of(4)
    logits = objective.logits(batch).detach().double()
    shares = 1 / (1 + (-logits).exp())
    right = torch.where(batch["labels"], shares, 1 - shares)
    assert objective(batch, SEED)["loss"].item() == pytest.approx(-right.log().mean().item() * 4, rel=1e-5)
    filled = batch_of(4, 6)
    for name in ("boxes", "labels"):
        filled[name][:4] = batch[name]
    assert objective(filled, SEED)["loss"].item() == pytest.approx(objective(batch, SEED)["loss"].item(), rel=1e-6)


@pytest.mark.compile
def test_a_step_reads_nothing_back_and_keeps_its_shapes() -> None:
    """As one graph: the compiler refuses whatever a value on the device decides. One graph serves any number of boxes."""
    counted: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        counted.append(1)
        return graph

    objective = small()
    torch._dynamo.reset()
    step = torch.compile(objective, backend=backend, fullgraph=True, dynamic=False)
    for boxes in (0, 3, 8):
        batch = batch_of(boxes, 8 - boxes)
        assert step(batch, SEED)["loss"].item() == pytest.approx(objective(batch, SEED)["loss"].item(), rel=1e-5)
    assert len(counted) == 1


def test_bf16_is_near_fp32_and_box_coordinates_stay_exact() -> None:
    objective, batch = small(), batch_of(5, size=(32, 512))
    batch["boxes"][:, 0::2] += 430.0  # 16 bits would move these by a pixel
    exact = objective.logits(batch)
    objective.bf16 = True
    near = objective.logits(batch)
    assert near.dtype == torch.float32
    error = ((near - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.01


def test_boxes_at_and_beyond_the_edge_are_finite() -> None:
    objective, batch = small(), batch_of(6)
    batch["boxes"] = torch.tensor(
        [[0, 0, 0, 0], [31, 31, 31, 31], [-9, -9, -3, -3], [40, 40, 90, 90], [5, 5, 2, 2], [0, 0, 31, 31]],
        dtype=torch.float32,
    )
    loss = objective(batch, SEED)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in objective.trainable.parameters())


def test_pictures_need_not_be_square_but_multiples_of_the_patch() -> None:
    objective = small()
    assert objective.detector.feature_map(batch_of(1, size=(48, 80))["video"]).shape == (2, 32, 3, 5)
    with pytest.raises(ValueError, match="2 frames of 32 x 40 pixels is not a multiple of 1 x 16 x 16; pad the batch"):
        objective.detector.feature_map(torch.zeros(1, 2, 32, 40, 3, dtype=torch.uint8))


def test_padding_is_zero_after_normalization_whatever_the_pixels_hold() -> None:
    detector, batch = small().detector, batch_of(1)
    pixels = detector.normalized(batch["video"], batch["sizes"])
    assert pixels[1, :, :, 23:].abs().max() == 0 and pixels[1, :, :, :, 27:].abs().max() == 0
    expected = (batch["video"][1, 1, 5, 6].double() - torch.tensor([122.7717, 115.9465, 102.9801])) / 57.375
    torch.testing.assert_close(pixels[1, :, 1, 5, 6].double(), expected, rtol=1e-5, atol=1e-6)


def test_layers_and_flops() -> None:
    objective = small()
    found = {name: objective.layer_id(name) for name, _ in objective.trainable.named_parameters()}
    assert {found[name] for name in found if name.startswith("patch_embed.")} == {0}
    assert found["blocks.0.norm1.weight"] == 1 and found["blocks.1.mlp.fc2.bias"] == 2
    assert found["norm.weight"] == found["head.weight"] == 3
    # torch 2.11 counts no fused attention on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(batch_of(1), SEED)["loss"].backward()
    head = 3 * 2 * 32 * 5  # of one box
    assert counter.get_total_flops() == 2 * objective.flops_per_clip() + head


def write_keys(folder: Path, count: int = 25) -> detections.KeyFrames:
    """Key frames of two movies; each has a detected box or two."""
    rng = np.random.default_rng(3)
    sizes = {"m": (70, 50), "n": (64, 33)}
    images = [
        {
            "id": n,
            "movie": "mn"[n % 2],
            "timestamp": 902 + n,
            "width": sizes["mn"[n % 2]][0],
            "height": sizes["mn"[n % 2]][1],
        }
        for n in range(count)
    ]
    boxes = [
        {"image_id": n, "bbox": [*rng.uniform(0, 20, 2).tolist(), *rng.uniform(5, 40, 2).tolist()], "score": 0.9}
        for n in range(count)
        for _ in range(1 + n % 2)
    ]
    (folder / "a.json").write_text(json.dumps({"images": images}))
    (folder / "d.json").write_text(json.dumps(boxes))
    return detections.test_frames(folder / "a.json", folder / "d.json")


def batches_of(keys: detections.KeyFrames, indices: list[int]) -> list[dict[str, torch.Tensor]]:
    """One batch a key frame, two empty rows each; pictures stay at their size."""
    out = []
    for index in indices:
        key = keys[index]
        count = len(key.boxes)
        out.append(
            {
                "index": torch.tensor([index]),
                "sizes": torch.tensor([[key.size[1], key.size[0]]]),
                "box_clip": torch.zeros(count + 2, dtype=torch.int64),
                "box_valid": torch.arange(count + 2) < count,
            }
        )
    return out


def made_up(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scores that depend on the key frame alone. Many are equal, but only when rounded to five decimals."""
    generator = torch.Generator().manual_seed(int(batch["index"][0]))
    coarse, fine = torch.rand(2, len(batch["box_clip"]), 3, generator=generator)
    return coarse.mul(4).round().div(4) + fine * 3e-6


NAMES = {1: "sit", 2: "stand", 3: "talk"}


def truth_of(keys: detections.KeyFrames) -> frame_map.Boxes:
    rows = []
    for n, key in enumerate(keys):
        box = (key.boxes[0] / torch.tensor([*key.size, *key.size])).tolist()
        rows.append(((key.movie, key.second), box, 1 + n % 3, 1.0))
    return frame_map.Boxes.of(rows)


def judge(keys: detections.KeyFrames, indices: list[int], **more: object) -> frame_map.FrameMap:
    return detected.evaluate(
        made_up, batches_of(keys, indices), keys, truth_of(keys), NAMES, device=torch.device("cpu"), **more
    )


def test_the_figure_is_that_of_the_written_file(tmp_path: Path) -> None:
    keys = write_keys(tmp_path)
    found = judge(keys, [*range(24, -1, -1)], result=tmp_path / "result.csv")
    rows = list(csv.reader(open(tmp_path / "result.csv", newline="")))
    assert frame_map.frame_map(truth_of(keys), frame_map.read_boxes(tmp_path / "result.csv"), NAMES) == found
    assert 0 < found.mean < 1
    assert len(rows) == 3 * sum(len(key.boxes) for key in keys)
    # By key frame, box and class; the far edge of the last pixel is included.
    key, scores = keys[1], made_up({"index": torch.tensor([1]), "box_clip": torch.zeros(4)})
    mine = [row for row in rows if row[:2] == [key.movie, f"{key.second:04d}"]]
    for number, row in enumerate(mine):
        left, top, right, bottom = key.boxes[number // 3].double().tolist()
        width, height = key.size
        corners = [left / width, top / height, min(1, (right + 1) / width), min(1, (bottom + 1) / height)]
        np.testing.assert_allclose([float(value) for value in row[2:6]], corners, atol=1.1e-5)
        assert all(len(value.partition(".")[2]) == 5 for value in (*row[2:6], row[7]))
        assert int(row[6]) == 1 + number % 3
        assert float(row[7]) == pytest.approx(scores[number // 3, number % 3].item(), abs=1e-5)
    assert judge(keys, [*range(25)], min_score=0.5).mean != found.mean
    assert judge(keys, [*range(25)], excluded={(keys[0].movie, keys[0].second)}).mean != found.mean


def test_a_result_that_cannot_be_finished_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    path.write_text("older")
    rows = frame_map.Boxes.of([(("m", 902), (0, 0, 1, 1), 1, 0.5), (("m", None), (0, 0, 1, 1), 1, 0.5)])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        detected.write_result(path, rows)
    assert path.read_text() == "older"
    detected.write_result(path, rows.kept(np.array([True, False])))
    assert path.read_bytes() == b"m,0902,0.00000,0.00000,1.00000,1.00000,1,0.50000\r\n"


def judge_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    keys = detections.test_frames(Path(folder) / "a.json", Path(folder) / "d.json")
    # The second rank sees key frame 0 once more, as samplers fill up.
    found = judge(keys, [[*range(0, 25, 2)], [*range(1, 25, 2), 0]][rank], result=f"{folder}/ranks.csv")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    try:
        judge(keys, [0], result=f"{folder}/absent/ranks.csv")
    except DataError as error:
        Path(folder, f"error{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    keys = write_keys(tmp_path)
    alone = judge(keys, [*range(25)], result=tmp_path / "alone.csv")
    mp.spawn(judge_on_a_rank, (str(tmp_path),), 2)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == json.loads(json.dumps(alone))
        assert "cannot be written" in (tmp_path / f"error{rank}.txt").read_text()
    assert (tmp_path / "ranks.csv").read_text() == (tmp_path / "alone.csv").read_text()


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    keys = write_keys(tmp_path)
    with pytest.raises(WeightsError, match="not finite"):
        detected.evaluate(
            lambda batch: made_up(batch) / 0 * 0,
            batches_of(keys, [0]),
            keys,
            truth_of(keys),
            NAMES,
            device=torch.device("cpu"),
        )


def test_nothing_detected_is_a_map_of_zero(tmp_path: Path) -> None:
    keys = write_keys(tmp_path)
    assert judge(keys, [0, 1], min_score=2.0, result=tmp_path / "r.csv").mean == 0
    assert (tmp_path / "r.csv").read_text() == ""


def test_weights_of_pretraining_and_of_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = {k: torch.randn_like(v) for k, v in small(num_classes=7).detector.state_dict().items()}
    tower = {k: v for k, v in source.items() if not k.startswith(("head.", "norm."))}
    norm = {k: v for k, v in source.items() if k.startswith("norm.")}
    files = {
        "stage1": {f"encoder.{k}": v for k, v in (tower | norm).items()}
        | {"clip_decoder.0.head.weight": torch.ones(2)},
        "classifier": tower
        | {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.ones(32)}
        | {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7), "pos_embed": torch.ones(1, 8, 32)},
        "detector": source,
    }
    caplog.set_level(logging.INFO, "umt_fast.weights")
    for kind, state in files.items():
        caplog.clear()
        path = tmp_path / f"{kind}.safetensors"
        save_state(state, path)
        detector = small(num_classes=7 if kind == "detector" else 5).detector
        load_detector(detector, path)
        loaded = detector.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in tower.items())
        fresh = next((r.message for r in caplog.records if "starting fresh" in r.message), "")
        assert torch.equal(loaded["norm.weight"], source["norm.weight"]) == (kind != "classifier")
        assert ("norm.weight" in fresh.split(": ")[-1].split(", ")) == (kind == "classifier")
        assert ("head.weight" in fresh) == (kind != "detector")
        if kind == "classifier":
            assert torch.equal(loaded["norm.weight"], torch.ones(32)) and "fc_norm.weight" in caplog.text
    broken = tmp_path / "broken.safetensors"
    save_state({k: v for k, v in files["stage1"].items() if "blocks.1" not in k}, broken)
    with pytest.raises(WeightsError, match=r"missing: blocks\.1"):
        load_detector(small().detector, broken)


def test_without_torchvision_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(ValueError, match=r"pip install 'umt_fast\[detection\]'"):
        small()


COLORS = {1: (220, 30, 30), 2: (30, 30, 220), 3: (30, 200, 30)}


def write_world(root: Path) -> tuple[Path, Path]:
    """Six movies of one-second files. In each key frame two people stand apart; a person's color is its class."""
    pytest.importorskip("av")
    images, annotations, boxes = [], [], []
    for number in range(6):
        movie, classes = f"movie{number}", (1 + number % 3, 1 + (number + 1 + number // 3) % 3)
        (root / movie).mkdir(parents=True)
        picture = np.full((64, 96, 3), 110, np.uint8)
        for place, label in enumerate(classes):
            left, top = 6 + 48 * place, 8 + 2 * number
            picture[top : top + 36, left : left + 36] = COLORS[label]
            box = [left, top, 36, 36]
            annotations.append({"image_id": number, "bbox": box, "action_ids": [label]})
            boxes.append({"image_id": number, "bbox": box, "score": 0.95})
        images.append({"id": number, "movie": movie, "timestamp": 902, "width": 96, "height": 64})
        for second in (901, 902):
            write_video(root / movie / f"{second}.mp4", [picture] * 4, rate=4)
    (root / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "d.json").write_text(json.dumps(boxes))
    return root / "a.json", root / "d.json"


def test_from_files_to_the_figure(tmp_path: Path) -> None:
    """Training on one-second files, and judging on whole pictures of another size, finds who is red, blue or green."""
    pytest.importorskip("cv2", reason="views are resized by OpenCV: pip install opencv-python-headless")
    annotations, boxes = write_world(tmp_path)
    files, temporal = SecondFiles(tmp_path), Temporal(num_frames=2, rate=2, span=8)
    rule = views.ViewRule(short_side=48, crop=32)
    torch.manual_seed(0)
    rng, objective = np.random.default_rng(0), small(num_classes=3)
    keys = detections.training_frames(annotations, 3)
    frames = {key.movie: files.read(key.movie, key.second, temporal) for key in keys}
    tests = detections.test_frames(annotations, boxes, num_classes=3)

    def figure() -> float:
        samples = [views.test_sample(n, key, frames[key.movie], rule) for n, key in enumerate(tests)]
        batches = [views.batched(samples[:4], boxes_per_clip=3), views.batched(samples[4:], boxes_per_clip=3)]
        assert batches[0]["video"].shape == (4, 2, 48, 80, 3)  # 72 wide, padded to 80
        objective.eval()
        truth = frame_map.Boxes.of(
            (
                (key.movie, key.second),
                (box / torch.tensor([96, 64, 96, 64])).tolist(),
                int(labels.int().argmax()) + 1,
                1.0,
            )
            for key in keys
            for box, labels in zip(key.boxes, key.labels, strict=True)
        )
        return detected.evaluate(
            objective.scores, batches, tests, truth, NAMES, device=torch.device("cpu"), result=tmp_path / "r.csv"
        ).mean

    untrained = figure()
    optimizer = torch.optim.AdamW(objective.trainable.parameters(), lr=2e-3)
    objective.train()
    for _ in range(60):
        samples = [views.training_sample(n, key, frames[key.movie], rule, rng) for n, key in enumerate(keys)]
        optimizer.zero_grad()
        objective(views.batched(samples, boxes_per_clip=2), SEED)["loss"].backward()
        optimizer.step()
    assert figure() > 0.95 > untrained + 0.2
