"""Stage 2, fast against plain: same weights, masks, words and negatives, same losses and gradients."""

import pytest
import torch

from umt_fast.bench import stage2
from umt_fast.bench.measure import Case, normalized
from umt_fast.config import ConfigError, Stage2Config
from umt_fast.reference.stage2 import PlainStage2, Words
from umt_fast.tasks.video_text import VideoTextPretraining


def small() -> Stage2Config:
    config = stage2.stage2_config("tiny", 3, "fp32")
    config.student.drop_path = config.text.hidden_dropout = config.text.attention_dropout = 0.0
    return config


@pytest.mark.parametrize("media", ["video", "image"])
def test_implementations_agree(media: str) -> None:
    torch.manual_seed(0)
    config, batch = small(), 3
    fast = VideoTextPretraining(config, mask_id=stage2.MASK_ID, special=stage2.SPECIAL)
    plain = PlainStage2(config, stage2.MASK_ID).train()
    plain.model.load_state_dict(fast.model.state_dict())
    plain.teacher.load_state_dict(fast.teacher.state_dict())
    frames = config.student.num_frames if media == "video" else 1
    video = torch.randint(256, (batch, frames, 64, 64, 3), dtype=torch.uint8)
    captions = stage2.random_captions(config, torch.device("cpu"))
    captions["sample"] = torch.tensor([4, 9, 4])  # two rows of one sample
    negatives = (torch.tensor([1, 2, 1]), torch.tensor([1, 0, 1]))

    (pairs,) = fast.prepare({"video": video, **captions}, torch.tensor([3]))
    ours = fast.losses([pairs._replace(negatives=negatives)])
    ours["loss"].backward()

    features, attention = plain.teacher(normalized(video))
    hidden = torch.ones(batch, frames * 16, dtype=torch.bool).scatter_(1, pairs.visible.long(), False)
    assert (~hidden).sum() == (~plain.draw_mask(attention, batch)).sum()
    words = Words(pairs.ids, pairs.mask, pairs.masked_ids, pairs.labels)
    theirs = plain.losses(normalized(video), features, hidden, words, captions["sample"], negatives)
    sum(theirs.values()).backward()

    assert theirs.keys() == {"vtc", "vtm", "mlm", "uta"} == ours.keys() - {"loss"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    expected = dict(plain.model.named_parameters())
    own = dict(fast.model.named_parameters())
    assert own.keys() == expected.keys()
    largest = max(parameter.grad.norm() for parameter in expected.values())
    for name, parameter in own.items():
        # A key bias gets nothing but rounding.
        floor = 1e-6 * largest
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm().clamp_min(floor)
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e}"


def test_plain_words_are_hidden_by_the_official_shares() -> None:
    torch.manual_seed(0)
    plain = PlainStage2(small(), stage2.MASK_ID)
    ids, mask = torch.randint(110, 1000, (400, 32)), torch.ones(400, 32, dtype=torch.bool)
    ids[:, 0], mask[:, 25:] = stage2.CLS_ID, False
    words = plain.hide_words(ids, mask, stage2.SPECIAL)
    asked = words.labels != -100
    assert not asked[:, 0].any() and not asked[:, 25:].any() and torch.equal(words.masked_ids[~asked], ids[~asked])
    assert abs(asked[:, 1:25].float().mean() - 0.5) < 0.02
    assert abs((words.masked_ids[asked] == stage2.MASK_ID).float().mean() - 0.8) < 0.02
    assert abs((words.masked_ids[asked] == ids[asked]).float().mean() - 0.1) < 0.02


@pytest.mark.parametrize("media", ["video", "image"])
@pytest.mark.parametrize("implementation", ["fast", "plain"])
def test_bench_reports_what_it_measured(implementation: str, media: str) -> None:
    case = Case(
        model="tiny", batch_size=2, device=torch.device("cpu"), dtype="fp32", implementation=implementation, steps=2
    )
    result = stage2.measure(case, media)
    assert result["bench"] == "stage2" and result["media"] == media and result["peak_memory_gib"] > 0
    assert sum(result["ms_per_part"].values()) > 0
    flops = VideoTextPretraining.flops_of(stage2.stage2_config("tiny", 2, "fp32"), image=media == "image")
    assert result["tflops"] == pytest.approx(result["clips_per_s"] * flops / 1e12, rel=1e-2, abs=1e-4)


def test_one_pair_alone_has_no_negative() -> None:
    with pytest.raises(ConfigError, match="hard negative"):
        stage2.main("tiny", batch_size=1)
