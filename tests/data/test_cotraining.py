"""Clips and images together: in turn, and a batch of each in one step."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from umt_fast.config import DataConfig
from umt_fast.data.loaders.captions import CaptionLoader
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.joint import AlternatingLoader, PackedLoader
from umt_fast.data.loaders.tokens import Tokens, load_tokenizer
from umt_fast.data.sources.lists import Clip

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "thing", "moves", "left", "##s"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


def both_kinds(tiny_list: Path, vocabulary: Path, clips: int = 6, images: int = 4) -> list[CaptionLoader]:
    """Clips of two frames and images, two a batch."""
    Image.new("RGB", (50, 40), "red").save(tiny_list.with_name("red.png"))
    tokenizer, data = load_tokenizer(str(vocabulary)), DataConfig(workers=0)
    parts = []
    for name, count, frames in (("video1.mp4", clips, 2), ("red.png", images, 1)):
        files = [Clip(path=str(tiny_list.with_name(name)))] * count
        loader = ClipLoader(files, data, num_frames=frames, image_size=32, batch_size=2, seed=1)
        parts.append(
            CaptionLoader(loader, Tokens(["a red thing"] * count, tokenizer, max_length=4), torch.arange(count))
        )
    return parts


def alternating(tiny_list: Path, vocabulary: Path) -> AlternatingLoader:
    return AlternatingLoader(both_kinds(tiny_list, vocabulary), seed=1)


def test_clips_and_images_take_turns(tiny_list: Path, vocabulary: Path) -> None:
    loader = alternating(tiny_list, vocabulary)
    batches = list(loader)
    frames = [batch["video"].shape[1] for batch in batches]
    assert len(loader) == 5 and sorted(frames) == [1, 1, 2, 2, 2]
    for batch in batches:
        image = batch["video"].shape[1] == 1
        assert all((number >= 6) == image for number in batch["index"].tolist())
        assert all(loader.name_of(number).endswith("png" if image else "mp4") for number in batch["index"].tolist())
        if image:  # decoded as it is
            assert batch["video"][0, 0, 5, 5].tolist() == [255, 0, 0]
    assert sorted(number for batch in batches for number in batch["index"].tolist()) == list(range(10))
    orders = {tuple(loader.order(epoch)) for epoch in range(8)}
    assert len(orders) > 1


def test_alternation_goes_on_where_it_stopped(tiny_list: Path, vocabulary: Path) -> None:
    whole = [batch["index"].tolist() for batch in alternating(tiny_list, vocabulary)]
    first, second = alternating(tiny_list, vocabulary), alternating(tiny_list, vocabulary)
    it = iter(first)
    seen = [next(it)["index"].tolist() for _ in range(3)]
    second.load_state_dict(first.state_dict())
    assert seen + [batch["index"].tolist() for batch in second] == whole


@pytest.mark.parametrize(("clips", "images"), [(6, 4), (4, 10)])
def test_every_packed_step_has_both_kinds(clips: int, images: int, tiny_list: Path, vocabulary: Path) -> None:
    """Three epochs: the longer kind ends with each, the shorter one starts over with an order of its own."""
    loader = PackedLoader(*both_kinds(tiny_list, vocabulary, clips, images))
    assert len(loader) == max(clips, images) // 2
    seen: list[list[int]] = [[], []]
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch["video"].shape[:2] == (2, 2) and batch["image_video"].shape[:2] == (2, 1)
            assert batch["image_video"][0, 0, 5, 5].tolist() == [255, 0, 0]
            assert batch["image_ids"].shape == batch["image_mask"].shape and len(batch["index"]) == 4
            numbers = batch["index"].tolist()
            assert batch["sample"].tolist() == numbers[:2]
            assert batch["image_sample"].tolist() == [number - clips for number in numbers[2:]]
            assert [loader.name_of(number)[-3:] for number in numbers] == ["mp4", "mp4", "png", "png"]
            for kind in range(2):
                seen[kind] += numbers[2 * kind : 2 * kind + 2]
    for numbers, count, first in zip(seen, (clips, images), (0, clips), strict=True):
        passes = [numbers[i : i + count] for i in range(0, len(numbers), count)]
        assert all(sorted(one) == list(range(first, first + count)) for one in passes if len(one) == count)
        assert len({tuple(one) for one in passes[:3]}) > 1


@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_packed_steps_go_on_where_they_stopped(stop: int, tiny_list: Path, vocabulary: Path) -> None:
    """Nine steps of three epochs in one go, and cut at a step that may be within a pass of the shorter kind."""

    def steps(loader: PackedLoader, first: int, last: int) -> list[tuple]:
        found = []
        while first < last:
            loader.set_epoch(first // len(loader))
            batches = iter(loader)
            for batch in batches:
                found.append((batch["index"].tolist(), batch["video"].sum().item(), batch["image_video"].sum().item()))
                first += 1
                if first == last:
                    break
            batches.close()
        return found

    whole = steps(PackedLoader(*both_kinds(tiny_list, vocabulary)), 0, 9)
    before, after = (PackedLoader(*both_kinds(tiny_list, vocabulary)) for _ in range(2))
    parts = steps(before, 0, stop)
    after.load_state_dict(before.state_dict())
    assert parts + steps(after, stop, 9) == whole
