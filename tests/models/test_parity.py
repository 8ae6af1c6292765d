"""Our modules against what the official implementation computed from the same weights, file by file.

Every `stage1_*.safetensors` and `tubelet2_*.safetensors` (two frames a token) of parity_files is a case; everything that
may vary comes from its metadata.
"""

from pathlib import Path

import pytest
import torch

import kernels
from tests.parity_files import parity_files, read_case, relative, tower_of
from umt_fast.config import AlignConfig, MaskConfig, RunConfig, Stage1Config, TeacherConfig
from umt_fast.models.weights import fit
from umt_fast.tasks.pretraining import UnmaskedAlignment

CASES = parity_files("stage1") + parity_files("tubelet2")
BACKENDS = ["reference", "triton"]
LIMIT = 1e-4


class Case:
    """One file: the tensors, and our objective filled with its weights."""

    def __init__(self, path: Path) -> None:
        sizes, self.tensors = read_case(path)
        self.sizes, self.normalize, self.loss = sizes, sizes["fmt"], sizes["loss"]
        config = Stage1Config(
            run=RunConfig(dtype="fp32"),
            student=tower_of(sizes),
            teacher=TeacherConfig(
                width=sizes["twidth"],
                depth=sizes["tdepth"],
                num_heads=sizes["theads"],
                patch_size=sizes["tpatch"],
                image_size=sizes["timg"],
                output_dim=sizes["tout"],
                weights="untrained",
            ),
            mask=MaskConfig(ratio=sizes["ratio"]),
            align=AlignConfig(num_layers=sizes["k"], normalize=self.normalize, loss=self.loss),
        )
        self.objective = UnmaskedAlignment(config)
        for part in ("student", "teacher"):
            state = {k.removeprefix(f"{part}."): v for k, v in self.tensors.items() if k.startswith(f"{part}.")}
            fit(getattr(self.objective, part), state, str(path))
        self.video, mask = self.tensors["in.video"], self.tensors["in.mask"]
        self.visible = (~mask).nonzero()[:, 1].view(mask.shape[0], -1).to(torch.int32)
        per_frame = mask.view(mask.shape[0], self.objective.student.encoder.grid.frames, -1)
        self.rectangular = (per_frame.sum(-1) == per_frame.sum(-1)[0, 0]).all().item()

    def lean_targets(self) -> torch.Tensor:
        """The training backend's targets at the file's mask instead of a drawn one."""
        teacher = self.objective.teacher
        with torch.no_grad():
            x, features = teacher.embed(self.video), []
            for depth, block in enumerate(teacher.blocks[:-1]):
                x = block(x)
                if depth >= len(teacher.blocks) - teacher.num_layers:
                    features.append(x)
            y = teacher.blocks[-1].ln_1(x)
            k, v = teacher.blocks[-1].attn.project(y, slice(1, 3))
            return teacher.targets_at(self.visible, x, y, k, v, features, rectangular=self.rectangular)

    def unit(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True) if self.normalize == "l2" else x


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_every_kind_of_case_is_found() -> None:
    names = {path.name.split("_")[0] for path in CASES}
    assert names == {"stage1", "tubelet2"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher(case: Case, backend: str) -> None:
    with kernels.force_backend(backend):
        features, attention = case.objective.teacher.features(case.video)
        targets = case.lean_targets()
    assert relative(case.unit(features), case.tensors["out.teacher_features"]) < LIMIT
    assert relative(attention, case.tensors["out.teacher_attention"]) < LIMIT
    assert relative(case.unit(targets), case.tensors["out.targets"]) < LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
def test_student_loss_and_every_gradient(case: Case, backend: str) -> None:
    student = case.objective.student
    student.zero_grad()
    with kernels.force_backend(backend):
        heads = student(case.video, case.visible)
        loss = kernels.align_loss(
            heads, case.lean_targets(), student.norm_weight, student.norm_bias, normalize=case.normalize, loss=case.loss
        )
        loss.backward()
    output = kernels.align_features(heads, student.norm_weight, student.norm_bias, normalize=case.normalize)
    assert relative(output, case.tensors["out.student"]) < LIMIT
    assert relative(loss.view(1), case.tensors["out.loss"]) < LIMIT
    gradients = {key.removeprefix("grad."): value for key, value in case.tensors.items() if key.startswith("grad.")}
    gradients = {key.removeprefix("student."): value for key, value in gradients.items()}
    ours = {key: parameter.grad for key, parameter in student.named_parameters()}
    assert set(gradients) == set(ours)
    worst = {key: relative(ours[key], value) for key, value in gradients.items()}
    assert max(worst.values()) < LIMIT, sorted(worst.items(), key=lambda item: -item[1])[:5]


def test_targets_taken_from_all_tokens_inside_the_loss(case: Case) -> None:
    """The loss kernel's own gathering of teacher rows gives the official loss too."""
    student = case.objective.student
    features, _ = case.objective.teacher.features(case.video)
    heads = student(case.video, case.visible)
    loss = kernels.align_loss(
        heads,
        features,
        student.norm_weight,
        student.norm_bias,
        visible=case.visible,
        normalize=case.normalize,
        loss=case.loss,
    )
    assert relative(loss.view(1), case.tensors["out.loss"]) < LIMIT


def test_the_training_step_draws_masks_of_the_official_size(case: Case) -> None:
    """The whole step, its own mask: as many visible tokens, in every frame as many, and finite layer losses."""
    found = case.objective({"video": case.video}, torch.tensor([3]))
    visible = case.objective.teacher(case.video, case.objective.config.mask, torch.tensor([3])).visible
    assert visible.shape == case.visible.shape
    per_frame = case.objective.student.encoder.grid.per_frame
    for mine, theirs in zip(visible // per_frame, case.visible // per_frame, strict=True):
        assert mine.bincount().tolist() == theirs.bincount().tolist()
    assert len(found) == 1 + case.sizes["k"] and all(value.isfinite() for value in found.values())
