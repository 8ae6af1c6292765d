"""Mixup, CutMix and the scores of several views against what the official implementation computed, file by file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity_files import cases_or_skip, read_case
from umt_fast.config import ConfigError, MixConfig
from umt_fast.tasks.mixing import cut_box, draw, kept_share, mixed, soft_targets
from umt_fast.tasks.views import ViewScores, per_class_accuracy, top_shares


def settings(options: dict) -> MixConfig:
    return MixConfig(
        mixup_alpha=options["mixup_alpha"],
        cutmix_alpha=options["cutmix_alpha"],
        cutmix_minmax=tuple(options.get("cutmix_minmax") or ()),
        probability=options["prob"],
        switch=options["switch_prob"],
        per={"batch": "batch", "elem": "clip"}[options["mode"]],
    )


@pytest.mark.parametrize("path", cases_or_skip("mixup"))
def test_mixed_clips_and_targets_parity(path: Path) -> None:
    config, tensors = read_case(path)
    for case in config["cases"]:
        video, label = tensors[f"{case['name']}.in.video"], tensors[f"{case['name']}.in.labels"]
        batch = len(label)
        cut = torch.tensor(case["use_cutmix"]).expand(batch)
        drawn = iter(
            case["boxes_yyxx"] if cut.ndim and case["options"]["mode"] == "elem" else case["boxes_yyxx"] * batch
        )
        box = torch.tensor([next(drawn) if one else [0, 0, 0, 0] for one in cut.tolist()])
        share = torch.tensor(case["lam_drawn"], dtype=torch.float32).expand(batch).clone()
        for row in range(batch):
            if cut[row]:
                share[row] = kept_share(*video.shape[-2:], box[row].tolist())
        found = mixed(video, share, box)
        torch.testing.assert_close(found, tensors[f"{case['name']}.out.video"], rtol=1e-5, atol=1e-6, msg=case["name"])
        options = case["options"]
        targets = soft_targets(label, options["num_classes"], share, options["label_smoothing"])
        torch.testing.assert_close(
            targets, tensors[f"{case['name']}.out.targets"], rtol=1e-5, atol=1e-6, msg=case["name"]
        )


@pytest.mark.parametrize("path", cases_or_skip("mixup"))
def test_boxes_parity(path: Path) -> None:
    config, tensors = read_case(path)
    height, width = config["shape"][-2:]
    for case in config["cases"]:
        if not case["boxes_yyxx"] or "cutmix_minmax" in case["options"] or case["options"]["mode"] == "elem":
            continue  # their shares are given as corrected by the box
        y, x = case["integers_drawn"]
        (box,) = case["boxes_yyxx"]
        assert list(cut_box(height, width, case["lam_drawn"], y, x)) == box
        assert kept_share(height, width, box) == pytest.approx(case["lam_after_box"][0], abs=1e-12)


@pytest.mark.parametrize("path", cases_or_skip("mixup"))
def test_draws_parity(path: Path) -> None:
    """Every option's draws are such as the official code can make, with the shares of both kinds."""
    config, _ = read_case(path)
    height, width = 40, 60
    for case in config["cases"]:
        options, mix, rng = case["options"], settings(case["options"]), np.random.default_rng(7)
        steps, cuts, alone, shares = 3000, 0, 0, []
        for _ in range(steps):
            share, box = draw(mix, 4, height, width, rng)
            if options["mode"] == "batch":
                assert (share == share[0]).all() and (box == box[0]).all()
            area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
            assert ((box >= 0) & (box <= [height, height, width, width])).all()
            assert share[area > 0] == pytest.approx(1 - area[area > 0] / (height * width), abs=1e-6)
            cuts, alone = cuts + int(area[0] > 0), alone + int(share[0] == 1)
            shares.append(share[0])
        if options.get("cutmix_minmax") is None and options["cutmix_alpha"] == 0:
            assert cuts == 0 and np.mean(shares) == pytest.approx(0.5, abs=0.03)
        both = options["mixup_alpha"] > 0 and options["cutmix_alpha"] > 0
        # A box may be empty: then nothing is cut, which a share drawn near 1 makes.
        expected = options["prob"] * (options["switch_prob"] if both else float(options["cutmix_alpha"] > 0))
        assert cuts / steps == pytest.approx(expected, abs=0.05), case["name"]
        if options["prob"] < 1:
            assert alone / steps == pytest.approx(1 - options["prob"], abs=0.05)


def test_mixing_is_refused_with_numbers_out_of_range() -> None:
    for wrong in ({"mixup_alpha": -1.0}, {"switch": 1.5}, {"cutmix_minmax": (0.8, 0.2)}, {"cutmix_minmax": (0.1,)}):
        with pytest.raises(ConfigError, match=f"mix.{next(iter(wrong))}"):
            MixConfig(**wrong)


def test_targets_of_one_clip_add_up_to_one_and_keep_the_larger_share() -> None:
    targets = soft_targets(torch.tensor([1, 3]), 5, torch.tensor([0.7, 0.7]), 0.1)
    assert targets.sum(1).tolist() == pytest.approx([1, 1])
    assert targets.argmax(1).tolist() == [1, 3]


@pytest.mark.parametrize("path", cases_or_skip("views"))
@pytest.mark.parametrize("ranks_apart", [False, True], ids=["one rank", "several ranks"])
def test_scores_of_views_parity(path: Path, ranks_apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = read_case(path)
    logits, label, order = tensors["in.logits"], tensors["in.labels"], tensors["in.order"]
    segments, crops = config["segments"], config["crops"]
    parts = [order[rank :: config["ranks"]] for rank in range(config["ranks"])] if ranks_apart else [order]
    collected = []
    for part in parts:
        scores = ViewScores(segments * crops)
        for rows in part.split(7):
            segment, crop, video = rows.unbind(1)
            scores.add(video, segment * crops + crop, logits[segment, crop, video])
        collected.append((scores._done, scores._open))
    monkeypatch.setattr("umt_fast.tasks.views.gather", lambda own: collected)
    judged = scores.judged()
    assert judged.index.tolist() == list(range(config["videos"]))
    assert sorted(set(judged.views.tolist())) == sorted(set(config["views_counted_per_video"]))
    torch.testing.assert_close(judged.scores, tensors["out.scores"], rtol=1e-4, atol=1e-7)
    assert judged.scores.argmax(1).tolist() == tensors["out.predicted"].tolist()
    assert 100 * top_shares(judged.scores, label, 1) == pytest.approx(config["top1"])
    assert 100 * top_shares(judged.scores, label, 5) == pytest.approx(config["top5"])


def test_a_view_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="view 4 of clip 1"):
        ViewScores(4).add(torch.tensor([1]), torch.tensor([4]), torch.zeros(1, 3))


def test_accuracy_of_each_class() -> None:
    scores = torch.tensor([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0]])
    found = per_class_accuracy(scores, torch.tensor([0, 1, 1]))
    assert found[:2].tolist() == [1, 0.5] and found[2].isnan()
