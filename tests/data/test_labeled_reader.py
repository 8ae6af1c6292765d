"""The published protocol's samples: what they follow from, and which views they are."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umt_fast.config import AugmentConfig, ConfigError, DataConfig
from umt_fast.data.decode import classification_crops as crops
from umt_fast.data.decode.classification_frames import RULES
from umt_fast.data.decode.rand_augment import Policy
from umt_fast.data.decode.video import decode_frames
from umt_fast.data.errors import DataError
from umt_fast.data.loaders.clips import ClipLoader
from umt_fast.data.loaders.labeled import LabeledReader
from umt_fast.data.prepare.shards import prepare
from umt_fast.data.sources.lists import read_list
from umt_fast.data.sources.prepared import Settings

PUBLISHED = AugmentConfig(protocol="published", erasing=0.5)


def loader(
    table: Path, augment: AugmentConfig = PUBLISHED, *, train: bool = True, views=(1, 1), **options: object
) -> ClipLoader:
    data = DataConfig(workers=options.pop("workers", 0), num_sample=2, **options.pop("data", {}))
    reader = functools.partial(LabeledReader, augment=augment, segments=views[0], crops=views[1])
    kind = {"num_frames": 4, "image_size": 32, "batch_size": 1, "seed": 3, "train": train, "reader": reader}
    return ClipLoader(read_list(table, data), data, **(kind | options))


def batches(of: ClipLoader, epoch: int = 0) -> list[dict]:
    of.set_epoch(epoch)
    return list(of)


def equal(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a) for a, b in zip(one, other, strict=True)
    )


def test_a_training_sample_is_what_its_key_draws(tiny_list: Path) -> None:
    """Frames by (seed, epoch, clip), each repeat's augmentation by (seed, epoch, clip, repeat), applied by hand."""
    found = {batch["index"][0].item(): batch for batch in batches(loader(tiny_list), 5)}
    for number, batch in found.items():
        key = (3, 5, number)
        count = 12
        chosen = RULES["kinetics_sparse"].train(count, 4, np.random.default_rng((*key, 0)))
        frames = decode_frames(tiny_list.parent / f"video{number}.mp4", lambda _, chosen=chosen: chosen)
        for repeat in range(2):
            rng = np.random.default_rng((*key, 1, repeat))
            policy = Policy.parse(PUBLISHED.rand_augment)
            wanted = crops.training_view(frames, 32, rng, policy=policy, flip=True, erasing=0.5)
            assert np.array_equal(batch["video"][repeat].numpy(), wanted.video)
            assert batch["erase_box"][repeat].tolist() == [list(box) for box in wanted.boxes]
        assert batch["label"].tolist() == [number, number]
        assert not np.array_equal(batch["video"][0], batch["video"][1])


def test_workers_resume_and_epochs(tiny_list: Path) -> None:
    whole = batches(loader(tiny_list))
    assert equal(whole, batches(loader(tiny_list, workers=1)))
    assert not equal(whole, batches(loader(tiny_list), 1))
    begun = loader(tiny_list)
    first = next(iter(begun))
    resumed = loader(tiny_list)
    resumed.load_state_dict(begun.state_dict())
    assert equal([first, *resumed], whole)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"rand_augment": ""}, False),
        ({"interpolation": "bilinear"}, False),
        ({"crop_area": (0.9, 1.0)}, False),
        ({"crop_aspect": (1.0, 1.0)}, False),
        ({"frames": "dense", "sampling_rate": 2}, False),
        ({"erasing_mode": "black"}, True),  # the device's affair
        ({"erasing": 0.25, "frames": "kinetics"}, True),
    ],
)
def test_every_option_reaches_the_pixels(changed: dict, same: bool, tmp_path: Path, shared: Path) -> None:
    (tmp_path / "list.csv").write_text(f"{shared}/videos/test.mp4,0\n{shared}/videos/demo.mp4,1\n")
    pixels = [
        [batch["video"] for epoch in range(3) for batch in batches(loader(tmp_path / "list.csv", augment), epoch)]
        for augment in (PUBLISHED, dataclasses.replace(PUBLISHED, **changed))
    ]
    assert all((a == b).all() for a, b in zip(*pixels, strict=True)) == same


def test_flip_and_erasing_off(tiny_list: Path) -> None:
    plain = dataclasses.replace(PUBLISHED, erasing=0.0)
    assert all("erase_box" not in batch for batch in batches(loader(tiny_list, plain)))
    many = dataclasses.replace(PUBLISHED, erasing=1.0, erasing_count=3)
    (batch, _) = batches(loader(tiny_list, many))
    assert batch["erase_box"].shape == (2, 3, 4)
    with_flip, without = (
        [batches(loader(tiny_list, data={"flip": flip}), epoch) for epoch in range(4)] for flip in (None, False)
    )
    assert not all(equal(a, b) for a, b in zip(with_flip, without, strict=True))


def test_validation_and_test_views_are_the_official_ones(tmp_path: Path, shared: Path) -> None:
    path = shared / "videos" / "test.mp4"
    (tmp_path / "list.csv").write_text(f"{path},0\n")
    for name, rule in (("kinetics", RULES["kinetics_sparse"]), ("ssv2", RULES["ssv2"])):
        augment = AugmentConfig(frames=name)
        (batch,) = batches(loader(tmp_path / "list.csv", augment, train=False))
        frames = decode_frames(path, lambda count, rule=rule: rule.validation(count, 4))
        assert np.array_equal(batch["video"][0].numpy(), crops.validation_view(frames, 32))
        (batch,) = batches(loader(tmp_path / "list.csv", augment, train=False, views=(2, 3)))
        assert batch["view"].tolist() == list(range(6)) and batch["index"].tolist() == [0] * 6
        for segment in range(2):
            frames = decode_frames(path, lambda count, rule=rule, s=segment: rule.test(count, 4, 2, s))
            sized = crops.short_side_resized(frames, 32)
            for crop in range(3):
                wanted = crops.cut(sized, crops.test_window(*sized.shape[1:3], 3, crop))
                assert np.array_equal(batch["video"][3 * segment + crop].numpy(), wanted)


def test_folders_of_pictures_have_the_folder_rule(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(11):
        Image.fromarray(np.full((40, 48, 3), 20 * number, np.uint8)).save(folder / f"img_{number + 1:05d}.png")
    (tmp_path / "list.csv").write_text("clip,11,1\n")
    data = {"frame_pattern": "img_{:05d}.png"}
    (batch,) = batches(loader(tmp_path / "list.csv", AugmentConfig(frames="ssv2"), train=False, data=data))
    assert (batch["video"][0, :, 0, 0, 0] // 20).tolist() == RULES["ssv2_folder"].validation(11, 4).tolist()
    assert RULES["ssv2_folder"].validation(11, 4).tolist() != RULES["ssv2"].validation(11, 4).tolist()
    (batch,) = batches(loader(tmp_path / "list.csv", dataclasses.replace(PUBLISHED, frames="ssv2"), data=data))
    assert batch["video"].shape == (2, 4, 32, 32, 3)


def test_prepared_clips_train_and_are_judged_only_where_they_are_whole(tmp_path: Path, tiny_list: Path) -> None:
    for segments, per_segment in ((4, 1), (12, 1)):
        folder = tmp_path / f"prepared{segments}"
        prepare(tiny_list, folder, settings=Settings(segments=segments, per_segment=per_segment), workers=1)
        assert len(batches(loader(folder))) == 2
        if segments == 12:
            assert batches(loader(folder, train=False, views=(2, 3)))[0]["video"].shape == (6, 4, 32, 32, 3)
        else:
            with pytest.raises(DataError, match="holds 4 of its 12 frames, and the official views want others"):
                batches(loader(folder, train=False))
        with pytest.raises(DataError, match=r"augment\.frames dense"):
            loader(folder, AugmentConfig(protocol="published", frames="dense"))


def test_more_segments_than_the_rule_has_are_refused(tiny_list: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 segments x 3 crops cannot be judged: 3 test segments of SSV2"):
        loader(tiny_list, AugmentConfig(frames="ssv2"), train=False, views=(3, 3))


def test_a_clip_that_cannot_be_read(tmp_path: Path, tiny_list: Path) -> None:
    """Replaced in training, and an error of one line where it would be judged."""
    (tmp_path / "bad.csv").write_text("video0.mp4,0\nvideo1.mp4,1\nabsent.mp4,1\n")
    tolerant = loader(tmp_path / "bad.csv", data={"max_bad_share": 0.5})
    assert len(batches(tolerant)) == 3 and list(tolerant.bad_files) == [str(tmp_path / "absent.mp4")]
    for views in ((1, 1), (2, 3)):
        with pytest.raises(DataError, match=r"1 of the 3 files of the list are not there, the first: .*absent\.mp4"):
            batches(loader(tmp_path / "bad.csv", train=False, views=views))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rand_augment": "rand-m7-n4"}, r"augment\.rand_augment is 'rand-m7-n4'"),
        ({"erasing": 1.5}, r"augment\.erasing is 1\.5"),
        ({"erasing_count": 0}, r"augment\.erasing_count is 0"),
        ({"crop_area": (0.5, 0.2)}, r"augment\.crop_area"),
        ({"crop_aspect": (0.0, 1.0)}, r"augment\.crop_aspect"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**options)
