"""AVA's CSV files: what is read, and what a mistake in one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from umt_fast.data.errors import DataError
from umt_fast.data.sources import ava_csv

SIZES = {"m": (100, 80), "n": (200, 100)}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_ground_truth_as_csv_joins_the_classes_of_a_person(tmp_path: Path) -> None:
    truth = written(
        tmp_path / "truth.csv",
        "n,0903,0.25,0.5,0.75,1.000,12,1\nm,0904,0.0,0.0,1.0,1.0,1,0\nm,0902\nn,0903,0.25,0.5,0.75,1.000,80,1\n"
        "n,0903,0.25,0.5,0.75,1.000,3,2\n",
    )
    assert ava_csv.movies_of(truth) == ["m", "n"]
    keys = ava_csv.training_frames(truth, {"m": (10, 10), "n": (200, 100)})
    assert [(key.movie, key.second) for key in keys] == [("m", 904), ("n", 903)]
    assert keys[0].boxes.tolist() == [[0, 0, 9, 9]]  # the last pixel is included
    assert keys[1].boxes.tolist() == [[50, 50, 149, 99]] * 2
    assert [(row.nonzero().flatten() + 1).tolist() for row in keys[1].labels] == [[12, 80], [3]]
    with pytest.raises(DataError, match="line 2: the size of movie 'm' is not known"):
        ava_csv.training_frames(truth, {"n": (200, 100)})
    truth.write_text("m,902,0.1,0.1,0.5,1.5,3\n")
    with pytest.raises(DataError, match=r"line 1: .*coordinates in \[0, 1\]"):
        ava_csv.training_frames(truth, {"m": (10, 10)})
    truth.write_text("m,902\n")
    with pytest.raises(DataError, match="holds no box"):
        ava_csv.training_frames(truth, {"m": (10, 10)})


def test_excluded_key_frames_are_not_trained_on(tmp_path: Path) -> None:
    truth = written(tmp_path / "t.csv", "m,0902,0,0,1,1,1,0\nm,0903,0,0,1,1,1,0\n")
    excluded = ava_csv.read_excluded(written(tmp_path / "e.csv", "m,0902\n\nx,0904\n"))
    assert excluded == {("m", 902), ("x", 904)}
    assert ava_csv.training_frames(truth, SIZES, excluded=excluded).places() == [("m", 903)]
    assert ava_csv.count_frames(truth) == 2
    with pytest.raises(DataError, match="line 1: 'm,now' is not `movie,second`"):
        ava_csv.read_excluded(written(tmp_path / "e.csv", "m,now\n"))


DETECTED = """n,0903,0.25,0.5,0.75,1.0,,0.9
m,0904,-0.1,0.2,1.3,0.6,12,0.85
n,0903,0.25,0.5,0.75,1.0,80,0.9
n,0903,0.1,0.1,0.2,0.2,,0.79
m,0905,0.6,0.6,0.4,0.9,,0.99
o,0902,0.1,0.1,0.5,0.5,,0.99
m,0902
m,0904,0.5,0.5,0.9,0.9,,0.8
"""


def test_detected_boxes_as_csv(tmp_path: Path) -> None:
    """Lines of one box are one; boxes below .8 are left out, others cut to the picture; what vanishes leaves its key frame."""
    file = written(tmp_path / "d.csv", DETECTED)
    keys = ava_csv.test_frames(file, SIZES, {"m", "n"})
    assert keys.places() == [("m", 904), ("m", 905), ("n", 903)]
    assert keys[0].boxes.tolist() == [[0, 16, 99, 47], [50, 40, 89, 71]]
    assert keys[0].scores.tolist() == pytest.approx([0.85, 0.8]) and keys[0].labels is None
    assert keys[1].boxes.shape == (0, 4)  # its sides are exchanged
    assert keys[2].boxes.tolist() == [[50, 50, 149, 99]]
    assert len(ava_csv.test_frames(file, SIZES, {"n"}, 0.5)[0].boxes) == 2
    assert ava_csv.test_frames(file, SIZES, {"m"}, excluded={("m", 905)}).places() == [("m", 904)]
    with pytest.raises(
        DataError, match=r"no box of score 0.999 or more for the ground truth \(the best score is 0.99\)"
    ):
        ava_csv.test_frames(file, SIZES, {"m"}, 0.999)
    with pytest.raises(DataError, match=r"\(it has no box of its movies\)"):
        ava_csv.test_frames(file, SIZES, {"q"})
    with pytest.raises(DataError, match="line 6: the size of movie 'o' is not known"):
        ava_csv.test_frames(file, SIZES, {"o"})


MISTAKES = {
    "short": ("m,902,0.1,0.1,0.5\n", "line 1: 'm,902,0.1,0.1,0.5' is not `movie,second,x1,y1,x2,y2,class"),
    "outside": ("m,902,-0.1,0.1,0.5,0.5,3\n", r"coordinates in \[0, 1\]"),
    "exchanged": ("m,902,0.5,0.1,0.2,0.5,3\n", "line 1: the box 0.5,0.1,0.2,0.5 ends before it begins; x1 <= x2"),
    "class 0": ("m,902,0.1,0.1,0.5,0.5,0\n", "line 1: class 0; classes run from 1 to 80"),
    "class 81": ("m,901\nm,902,0.1,0.1,0.5,0.5,81,0\n", "line 2: class 81; classes run from 1 to 80"),
    "no class": ("m,902,0.1,0.1,0.5,0.5,\n", "line 1: .* is not `movie,second"),
    "second": ("m,1:30,0.1,0.1,0.5,0.5,3\n", "line 1: .* is not `movie,second"),
    "not finite": ("m,902,nan,0.1,0.5,0.5,3\n", "line 1: .* is not `movie,second"),
    "movie": (
        "x,902,0.1,0.1,0.5,0.5,3\n",
        "line 1: the size of movie 'x' is not known; it is missing below --root .train: --data.root",
    ),
    "empty": ("", "holds no box; give AVA's ground truth"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_ground_truth_is_named(name: str, tmp_path: Path) -> None:
    text, said = MISTAKES[name]
    with pytest.raises(DataError, match=said) as caught:
        ava_csv.training_frames(written(tmp_path / "t.csv", text), SIZES)
    assert str(tmp_path / "t.csv") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["m,902,0.1,0.1,0.5,0.5,0.9", "m,902,0.1,0.1,0.5,0.5,,nan", "m,902,a,0.1,0.5,0.5,,1"])
def test_a_mistake_in_detected_boxes_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: .* is not `movie,second,x1,y1,x2,y2,class,score`"):
        ava_csv.test_frames(written(tmp_path / "d.csv", f"m,901,0,0,1,1,,1\n{line}\n"), SIZES, {"m"})


def test_a_file_that_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="is no CSV file in UTF-8"):
        ava_csv.movies_of(tmp_path / "t.csv")
    with pytest.raises(DataError, match="is a folder, not a CSV file"):
        ava_csv.movies_of(tmp_path)
    with pytest.raises(DataError, match="names no movie"):
        ava_csv.movies_of(written(tmp_path / "t.csv", "\n"))
