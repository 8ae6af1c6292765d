"""Fine-tuning for retrieval as a run: batches, losses, continued, planned, tuned, converted, loaded; on several ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import umt_fast
from tests.assets import tiny
from umt_fast.__main__ import main
from umt_fast.config import ConfigError, RetrievalConfig, RetrievalLosses, RunConfig, to_dict
from umt_fast.engine.distributed import Ranks
from umt_fast.engine.tune_measure import difference, observe
from umt_fast.models.weights import WeightsError, load_state
from umt_fast.plan import PlanOptions, report, work_of
from umt_fast.tasks import check_used, task_of, tuning

REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = f"{REPOSITORY}/tests/assets/tiny.py:pairs"
ONE = Ranks(0, 1, torch.device("cpu"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "thing", "moves"]


@pytest.fixture
def captions(tiny_list: Path) -> Path:
    """Two clips, the first with two captions."""
    entries = [
        {"video": "video0.mp4", "caption": ["A red thing.", "red moves"]},
        {"video": "video1.mp4", "caption": "a blue thing"},
        {"video": "video0.mp4", "caption": "thing moves"},
    ]
    path = tiny_list.parent / "captions.json"
    path.write_text(json.dumps(entries))
    (tiny_list.parent / "vocab.txt").write_text("\n".join(WORDS))
    return path


def configured(captions: Path, **changes: object) -> RetrievalConfig:
    config = dataclasses.replace(tiny.pairs(), videos=(str(captions),), tokenizer=str(captions.parent), **changes)
    return dataclasses.replace(config, student=dataclasses.replace(config.student, drop_path=0.0))


def arguments(captions: Path, out: Path, *more: object) -> list[str]:
    words = ["train", PAIRS, "--videos", captions, "--tokenizer", captions.parent, "--run.out", out, *more]
    return [str(word) for word in words]


def test_batches_have_clips_texts_and_who_belongs_together(captions: Path) -> None:
    config = configured(captions)
    task = task_of(config)
    config.run.batch_size = 4
    (batch,) = list(task.loader(config, ONE))
    order = batch["index"].tolist()
    assert sorted(order) == [0, 1, 2, 3]
    assert batch["video"].shape == (4, 8, 32, 32, 3) and batch["video"].dtype == torch.uint8
    texts = {0: "a red thing", 1: "red moves", 2: "a blue thing", 3: "thing moves"}
    ids = {row: [WORDS.index(word) for word in ("[CLS]", *texts[row].split())] for row in texts}
    for row, own, mask in zip(order, batch["ids"], batch["mask"], strict=True):
        assert own[mask].tolist() == ids[row]
    sample = dict(zip(order, batch["sample"].tolist(), strict=True))
    assert sample[0] == sample[1] == sample[3] != sample[2]
    assert task.clips_of_epoch(config) == (4, f"rows of {captions}")
    whole = dataclasses.replace(config, captions="paragraph")
    whole.run.batch_size = 3
    assert task.clips_of_epoch(whole)[0] == 3 == len(next(iter(task.loader(whole, ONE)))["index"])


def test_a_run_learns_is_continued_bit_for_bit_and_used(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rate = ("--optim.lr", 1e-3)
    assert main(arguments(captions, tmp_path / "whole", "--run.max_steps", 6, *rate)) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] == pytest.approx(row["vtc"] + row["vtm"], abs=1e-5) for row in rows)
    assert main(arguments(captions, tmp_path / "parts", "--run.max_steps", 3, *rate)) == 0
    assert main(arguments(captions, tmp_path / "parts", "--run.max_steps", 6, *rate)) == 0
    whole, parts = (tmp_path / name / "checkpoint-00000006.pt" for name in ("whole", "parts"))
    states = [load_state(path) for path in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    content = torch.load(whole, weights_only=True)
    described = content["model_config"]
    assert described["task"] == "retrieval" and described["vit"]["num_frames"] == 8 and "lr" not in described
    # The official layout of fine-tuned files: plain BERT, no teacher, no alignment heads, no word head.
    assert {"text_encoder.embeddings.word_embeddings.weight", "temp", "itm_head.weight"} <= states[0].keys()
    assert not [
        key for key in states[0] if key.startswith(("text_encoder.bert.", "clip_teacher.")) or "clip_decoder" in key
    ]
    assert main(["convert", str(whole), str(tmp_path / "out.safetensors")]) == 0
    for file in (whole, tmp_path / "out.safetensors"):
        model = umt_fast.load_model(weights=file, device="cpu", tokenizer=captions.parent)
        assert isinstance(model, umt_fast.TunedVideoTextModel)
        clips = [captions.parent / f"video{number}.mp4" for number in (0, 1)]
        assert model.similarity(clips, ["a red thing", "blue"]).shape == (2, 2)
        assert torch.equal(model.network.state_dict()["vision_proj.weight"], states[0]["vision_proj.weight"])
    # What was fine-tuned starts another run, and with a rate of nothing comes out as it went in.
    still = ("--init", whole, "--optim.lr", 1e-30, "--run.max_steps", 1)
    assert main(arguments(captions, tmp_path / "again", *still)) == 0
    after = load_state(tmp_path / "again" / "checkpoint-00000001.pt")
    assert all((after[key].float() - states[0][key].float()).abs().max() < 1e-20 for key in after)


def test_stage_2_weights_start_a_run_on_more_frames(captions: Path, tmp_path: Path) -> None:
    """The tensors are the file's, and the first frames' positions those of stage 2."""
    stage2 = tiny.captions()
    stage2.init = ""
    pretrained = task_of(stage2).untrained(stage2).trainable
    torch.save({"model": pretrained.state_dict()}, tmp_path / "stage2.pth")
    config = configured(captions, init=str(tmp_path / "stage2.pth"))
    tuned = task_of(config).objective(config).trainable
    theirs = pretrained.state_dict()
    for key, value in tuned.state_dict().items():
        source = key.replace("text_encoder.", "text_encoder.bert.") if key.startswith("text_encoder.") else key
        assert torch.equal(value, theirs[source]), key
    short, long = (model.vision_encoder.encoder.position for model in (pretrained, tuned))
    assert len(long) == 2 * len(short) and torch.equal(long[: len(short)], short)
    config.init = str(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=r"none\.pth"):
        task_of(config).objective(config)


def test_it_is_planned_and_tuned(captions: Path) -> None:
    config = configured(captions)
    work = work_of(config)
    assert work.flops == task_of(config).untrained(config).flops_per_clip() and work.frozen == 0
    assert "4 clips x 1 crops" in report("pairs", config, PlanOptions()) and "rows of" in report(
        "pairs", config, PlanOptions()
    )
    unlisted = dataclasses.replace(config, videos=())
    with pytest.raises(ConfigError, match="--clips N"):
        report("pairs", unlisted, PlanOptions())
    record = json.loads(json.dumps(to_dict(config)))
    cases = [tuning.build_case("retrieval", record, exact=True) for _ in range(2)]
    assert not difference(observe(cases[0]), observe(cases[1]), "fp32")
    batch = cases[0].batches[0]
    assert batch["video"].shape == (2, 8, 32, 32, 3) and batch["ids"].shape == (2, 6) and batch["mask"].all()


def test_what_a_run_would_not_read_is_refused(captions: Path) -> None:
    for changes, expected in (
        ({"data": {"train": "x.csv"}}, "data.train is 'x.csv', but retrieval reads caption lists"),
        ({"data": {"root": "/x"}}, "data.root is '/x', but caption lists carry their folders"),
        ({"losses": {"vtc": 0.0, "gather": "full"}}, "losses.gather is 'full', but losses.vtc is 0"),
        ({"run": {"batch_size": 1}, "losses": {"vtm": 0.0}}, "run.batch_size is 1 on 1 rank"),
    ):
        config = configured(captions)
        for section, values in changes.items():
            setattr(config, section, dataclasses.replace(getattr(config, section), **values))
        with pytest.raises(ConfigError, match=expected):
            check_used(config, 1)
    for changes, expected in (
        ({"run": RunConfig(batch_size=1)}, "run.batch_size is 1; losses.vtm draws"),
        ({"max_length": 600}, r"max_length is 600; it must lie in \[2, text.max_positions = 512\]"),
        ({"embed_dim": 1}, "embed_dim is 1"),
    ):
        with pytest.raises(ConfigError, match=expected):
            RetrievalConfig(**changes)
    with pytest.raises(ConfigError, match="losses.vtc and losses.vtm are 0"):
        RetrievalLosses(vtc=0.0, vtm=0.0)
    config = configured(captions)
    config.videos = ()
    with pytest.raises(ConfigError, match="videos is empty"):
        task_of(config).loader(config, ONE)
    config = configured(captions)
    config.text = dataclasses.replace(config.text, vocab_size=9)
    with pytest.raises(ConfigError, match="text.vocab_size is 9, but the tokenizer .* has 10 words"):
        task_of(config).loader(config, ONE)


def test_a_clip_that_cannot_be_read_is_replaced_with_its_caption(captions: Path) -> None:
    """Officially the caption stays that of the missing clip."""
    (captions.parent / "video1.mp4").unlink()
    config = configured(captions)
    config.run.batch_size, config.data.max_bad_share = 4, 0.5
    loader = task_of(config).loader(config, ONE)
    (batch,) = list(loader)
    assert list(loader.bad_files) == [f"{captions.parent}/video1.mp4"]
    assert 2 not in batch["index"].tolist() and len(batch["index"]) == 4
    blue = WORDS.index("blue")
    assert not (batch["ids"] == blue).any() and len(set(batch["sample"].tolist())) == 1


@pytest.mark.slow
def test_two_ranks_train_as_one_does(captions: Path, tmp_path: Path) -> None:
    """The joint contrastive loss: losses and weights of one process with their clips together."""
    # With a large eps a step is in proportion to its gradient: AdamW's own would blow up the rounding of tiny ones.
    rate = ["--optim.lr", "0.5", "--optim.eps", "1"]
    more = ["--losses.vtm", "0", "--losses.gather", "full", "--run.max_steps", "3", *rate]
    more += ["--student.drop_path", "0", "--text.hidden_dropout", "0", "--text.attention_dropout", "0"]
    assert main(arguments(captions, tmp_path / "one", "--run.batch_size", 4, *more)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "umt_fast"]
    command += arguments(captions, tmp_path / "two", "--run.batch_size", 2, *more)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses, states = [], []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        states.append(load_state(tmp_path / name / "checkpoint-00000003.pt"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][0] != losses[0][-1]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5, msg=key)
