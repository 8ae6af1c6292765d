"""Names: the table of released files against its page and the official ones, what names build, which are refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import umt_fast
from umt_fast import hub, zoo
from umt_fast.config import ConfigError
from umt_fast.models.description import MODELS, STAGE1_MODELS

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_zoo_is_the_official_one() -> None:
    assert (REPOSITORY / "docs" / "zoo.md").read_text() == zoo.table(), "run python -m umt_fast.zoo > docs/zoo.md"
    assert zoo.ARCHITECTURES.keys() == (MODELS | STAGE1_MODELS).keys()
    names = umt_fast.list_models()
    assert names.keys() >= zoo.ARCHITECTURES.keys() and len(names) == len(zoo.ARCHITECTURES) + len(zoo.ZOO)
    assert len(zoo.ZOO) == 21 + 6 + 14 + 6  # single modality, stage 2, retrieval, question answering
    for entry in zoo.ZOO.values():
        assert not entry.model or entry.model in names
        tells = f"_f{entry.frames}_res{entry.image_size}"
        assert tells in entry.name or "_f" not in entry.name
        assert entry.model[4:7] in ("", entry.name.split("_")[-2 if entry.name.startswith(("ret_", "qa_")) else 0])


def test_the_zoo_agrees_with_the_published_pages() -> None:
    """Every name and score, against the official MODEL_ZOO pages where a copy of the official code is given."""
    official = Path(os.environ.get("UMT_OFFICIAL", "/nonexistent"))
    if not official.is_dir():
        pytest.skip("no official code; set UMT_OFFICIAL to a checkout of it")
    pages = [
        official / "single_modality" / "MODEL_ZOO.md",
        official / "multi_modality" / "MODEL_ZOO.md",
        official / "single_modality" / "action_detection" / "README.md",
    ]
    linked: set[str] = set()
    for page in pages:
        text = page.read_text()
        linked |= set(re.findall(r"/umt/\w+/(\w+)\.pth\)?.?>? ?(?:<b>)?\[?(?:ckpt)?", text))
        for line in text.splitlines():
            row = re.search(r"\| ([\d.]+) \| \[ckpt\]\(\S+/(\w+)\.pth\)", line)
            if row:
                assert zoo.ZOO[row[2]].score == float(row[1]), line
    wrongly_linked = {"ret_ssv2_tpl_l16_25m", "qa_msvd_l16_25m"}
    assert {name for name in linked if not name.endswith("res384_log")} - set(zoo.ZOO) == set()
    assert set(zoo.ZOO) - linked == wrongly_linked


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("umt_b15",), {}, "unknown model 'umt_b15'; did you mean 'umt_b16'?"),
        (("umt_b16",), {}, "no weights; give weights=PATH, or weights='untrained'"),
        ((), {}, "no weights"),
        ((), {"weights": "untrained"}, "needs the name of an architecture"),
        (("umt_b16_ft",), {"weights": "untrained"}, "needs num_classes"),
        (("umt_b16_stage1",), {"weights": "untrained", "num_classes": 3}, "no classifier"),
    ],
)
def test_refused_names(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        umt_fast.load_model(*arguments, **options)


def test_the_teacher() -> None:
    with pytest.raises(ConfigError, match="unknown teacher 'clip_b15'; did you mean 'clip_b16'"):
        umt_fast.load_teacher("clip_b15")
    with pytest.raises(ConfigError, match="no usual weights"):
        umt_fast.load_teacher("clip_tiny")
    torch.manual_seed(0)
    teacher = umt_fast.load_teacher("clip_tiny", weights="untrained", device="cpu", num_layers=2)
    video = torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    outputs, attention = teacher.features(video)
    assert outputs.shape == (2, 2, 48, 64) and attention.shape == (6, 16)
    torch.testing.assert_close(attention.sum(1), torch.ones(6), atol=1.0, rtol=0)


def test_importing_the_package_imports_no_torch() -> None:
    program = (
        "import sys, umt_fast\n"
        "assert umt_fast.list_models()['umt_b16'] and 'load_model' in dir(umt_fast)\n"
        "try:\n    umt_fast.no_such_thing\nexcept AttributeError as error:\n    print(error)\n"
        "print([name for name in ('torch', 'numpy', 'huggingface_hub', 'transformers') if name in sys.modules])\n"
        "umt_fast.load_model\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["module 'umt_fast' has no attribute 'no_such_thing'", "[]", "True"]
    assert all(getattr(umt_fast, name) is not None for name in umt_fast.__all__)
    assert (Path(umt_fast.__file__).parent / "py.typed").is_file()


def test_untrained_models_have_official_sizes() -> None:
    """Against the counts of parameters that the official code has when it builds its models."""
    built = {
        name: hub._untrained(name, None, None, None, 400 if name.endswith(("_ft", "_ava")) else None)
        for name in zoo.ARCHITECTURES
    }
    counted = {
        "umt_b16_stage1": 88_005_888,
        "umt_l16_stage1": 307_806_720,
        "umt_b16_ft": 85_944_976,
        "umt_l16_ft": 303_484_304,
    }
    counted |= {"umt_b16_ava": counted["umt_b16_ft"], "umt_l16_ava": counted["umt_l16_ft"]}  # norm in place of fc_norm
    classes = {"pretraining": umt_fast.StudentModel, "classification": umt_fast.ClassifierModel}
    classes["detection"] = umt_fast.DetectorModel
    with torch.device("meta"):
        for name, count in counted.items():
            network = classes[built[name]["task"]].empty(built[name])
            assert sum(parameter.numel() for parameter in network.parameters()) == count
        state = umt_fast.VideoTextModel.empty(built["umt_l16"]).state_dict()
    assert state["text_encoder.bert.embeddings.word_embeddings.weight"].shape == (30522, 1024)
    assert state["vision_proj.weight"].shape == (768, 1024) and "vision_encoder.clip_decoder.5.head.weight" in state
    assert built["umt_b16"]["vit"]["num_frames"] == 4 and built["umt_b16_ft"]["vit"]["num_frames"] == 8
