"""A training step is one graph, and nothing in it makes the host wait for the device."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from tests.assets import tiny
from umt_fast.config import Stage1Config
from umt_fast.engine.feeding import Feed
from umt_fast.engine.optim import build_optimizer
from umt_fast.engine.trainer import Trainer
from umt_fast.models.teachers.clip_text import ClipText
from umt_fast.tasks.pretraining import UnmaskedAlignment
from umt_fast.tasks.video_text import VideoTextPretraining

# Operators whose result, or its shape, the host must read.
READ_BY_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")


class HostWaits(TorchDispatchMode):
    """Notes every operator that would stall a GPU's stream: values or shapes read by the host, copies to and from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        self.names.append(operator._schema.name)
        name = operator._schema.name.removeprefix("aten::").lstrip("_")
        before = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        boolean = name.startswith("index") and any(leaf.dtype in (torch.bool, torch.uint8) for leaf in before[1:])
        if name.startswith(tuple(part.lstrip("_") for part in READ_BY_HOST)) or boolean:
            self.found.append(name)
        out = operator(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in [*before, *tree_leaves(out)] if isinstance(leaf, Tensor)}
        # A number on the host may enter an elementwise operator: it travels as a kernel argument.
        if name in ("to_copy", "copy", "copy_", "lift_fresh_copy") and len(devices) > 1:
            self.found.append(f"{name} between {' and '.join(sorted(devices))}")
        return out


@contextlib.contextmanager
def imagined(device: str) -> Iterator[HostWaits]:
    """Tensors without memory on a device that need not be there, and a record of what is asked of it."""
    with FakeTensorMode(), torch.device(device), HostWaits() as waits:
        yield waits


def config(teacher_patch: int) -> Stage1Config:
    """The tiny run, with the teacher at the student's resolution or at another."""
    config = tiny.tiny()
    config.teacher.patch_size, config.teacher.image_size = teacher_patch, 2 * teacher_patch
    config.student.drop_path = 0.1
    return config


def clips(frames: int = 4) -> dict[str, Tensor]:
    return {"video": torch.empty(2, frames, 32, 32, 3, dtype=torch.uint8)}


@pytest.mark.parametrize("teacher_patch", [16, 14])
def test_forward_on_a_gpu_never_waits(teacher_patch: int) -> None:
    with imagined("cuda") as waits:
        objective = UnmaskedAlignment(config(teacher_patch)).train()
        batch, seed = clips(), torch.empty(1, dtype=torch.int64)
        waits.found.clear()
        values = objective(batch, seed)
        assert values["loss"].device.type == "cuda" and waits.count > 100
    assert waits.found == []


def test_norms_of_the_teacher_are_one_kernel_each_on_a_gpu(hopper: None) -> None:
    settings = config(16)
    settings.run.dtype, settings.teacher.depth = "bf16", 3
    with imagined("cuda") as waits:
        teacher = UnmaskedAlignment(settings).teacher
        batch, seed = clips(), torch.empty(1, dtype=torch.int64)
        waits.names.clear()
        teacher(batch["video"], settings.mask, seed)
    # ln_pre, six of blocks, ln_post of two layers.
    assert waits.names.count("umt_kernels::gather_norm") == 9 and "aten::native_layer_norm" not in waits.names


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantizing_is_one_kernel_on_a_gpu(precision: str, hopper: None) -> None:
    settings = config(16)
    settings.run.dtype, settings.teacher.depth, settings.teacher.precision = "bf16", 3, precision
    with imagined("cuda") as waits:
        teacher = UnmaskedAlignment(settings).teacher
        batch, seed = clips(), torch.empty(1, dtype=torch.int64)
        waits.found.clear()
        waits.names.clear()
        teacher(batch["video"], settings.mask, seed)
    assert waits.found == []
    # Three layers in each block but the last.
    assert waits.names.count("umt_kernels::quantize_rows") == 6 and "aten::amax" not in waits.names
    assert waits.names.count("umt_kernels::dequantize_product") == (6 if precision == "int8" else 0)


@pytest.mark.parametrize("uta", [1.0, 0.0])
def test_forward_of_stage_2_on_a_gpu_never_waits(uta: float, hopper: None) -> None:
    with imagined("cuda") as waits:
        objective, batch = stage2(uta)
        seed = torch.empty(1, dtype=torch.int64)
        waits.found.clear()
        values = objective.train()(batch, seed)
        assert values["loss"].device.type == "cuda" and waits.count > 100
    assert waits.found == []


def test_backward_and_update_never_wait() -> None:
    """On imagined CPU tensors: the backward pass of imagined GPU tensors needs a real GPU."""
    with kernels.force_backend("triton"), imagined("cpu") as waits:
        objective = UnmaskedAlignment(config(16)).train()
        optimizer = build_optimizer(objective.trainable, config(16).optim, lr=1e-3)
        loss = objective(clips(), torch.empty(1, dtype=torch.int64))["loss"]
        waits.found.clear()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in objective.student.parameters()])
        optimizer.found_inf = torch.isfinite(norm).logical_not().float()
        optimizer.step()
    assert waits.found == []


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (lambda x: x.to("cpu"), "to_copy between cpu and cuda"),
        (lambda x: x + torch.tensor([1.0, 2.0], device="cuda"), "to_copy between cpu and cuda"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.sum().item(), "local_scalar_dense"),
        (lambda x: x if x.sum() > 0 else -x, "local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_a_planted_wait_is_found(planted: Callable[[Tensor], object], name: str) -> None:
    with imagined("cuda") as waits:
        x = torch.empty(2)
        # Imagined tensors have no values to read: these operators fail, after they were noted.
        with contextlib.suppress(RuntimeError, NotImplementedError):
            planted(x)
    assert any(found.startswith(name) for found in waits.found), waits.found


@pytest.mark.compile
def test_the_whole_objective_is_one_graph() -> None:
    torch.manual_seed(0)
    settings = config(16)
    settings.student.drop_path = 0.0
    objective = UnmaskedAlignment(settings).train()
    batch = {"video": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)}
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")
    found = []
    for module in (objective, compiled):
        objective.zero_grad()
        values = module(batch, torch.tensor([5]))
        values["loss"].backward()
        found.append([values["loss"].detach(), *(p.grad.clone() for p in objective.student.parameters())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.compile
@pytest.mark.slow
def test_the_whole_objective_of_stage_2_is_one_graph() -> None:
    settings = tiny.captions()
    settings.student.drop_path = settings.text.hidden_dropout = settings.text.attention_dropout = 0.0
    objective = VideoTextPretraining(settings, mask_id=3, special=(0, 1, 2)).train()
    batch = {
        "video": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8),
        "ids": torch.randint(4, 16, (2, 6)),
        "mask": torch.ones(2, 6, dtype=torch.bool),
        "sample": torch.arange(2),
    }
    # Graph breaks show without a compiler behind the tracer, and the tracer is the quick part.
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="eager")
    found = []
    for module in (objective, compiled):
        torch.manual_seed(1)
        found.append({name: value.detach() for name, value in module(batch, torch.tensor([5])).items()})
    torch.testing.assert_close(found[0], found[1])


def stage1(precision: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    settings = config(16)
    settings.run.dtype, settings.teacher.precision = "bf16", precision
    return UnmaskedAlignment(settings), clips()


def stage2(uta: float = 1.0) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A packed step: clips and images."""
    settings = tiny.captions()
    settings.run.dtype, settings.losses.uta = "bf16", uta
    texts = {"ids": torch.empty(2, 6, dtype=torch.int64), "mask": torch.empty(2, 6, dtype=torch.bool)}
    texts["sample"] = torch.empty(2, dtype=torch.int64)
    batch = clips() | texts | {f"image_{name}": value for name, value in (clips(1) | texts).items()}
    return VideoTextPretraining(settings, mask_id=3, special=(0, 1, 2)), batch


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch asks of a GPU before it computes in bf16, answered as an H100 would."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)


STEPS = {precision: functools.partial(stage1, precision) for precision in ("native", "int8", "fp8")} | {
    "2": stage2,
    "2 without alignment": functools.partial(stage2, 0.0),
}


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_the_objective_is_one_graph_on_a_gpu(make: Callable, hopper: None) -> None:
    """The backends that only CUDA tensors in bf16 take; the tracer needs no GPU."""
    torch.compiler.reset()
    with FakeTensorMode():
        with torch.device("cuda"):
            objective, batch = make()
            seed = torch.empty(1, dtype=torch.int64)
        graphs = []

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            graphs.append(graph)
            return graph

        loss = torch.compile(objective.train(), fullgraph=True, dynamic=False, backend=keep)(batch, seed)["loss"]
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("umt_kernels" in target for target in targets), "the Triton backend"
    assert not any("quantize" in target for target in targets), "what a compiler fuses"
    if "image_video" in batch:
        assert any("varlen" in target for target in targets), "packed attention"


@pytest.mark.compile
@pytest.mark.slow
def test_clips_text_tower_is_one_graph_and_never_waits() -> None:
    pytest.importorskip("open_clip")
    sizes = {"width": 64, "depth": 2, "vocab_size": 50, "context_length": 12, "output_dim": 8, "quick_gelu": True}
    with imagined("cuda") as waits:
        tower = ClipText(**sizes).compute_in(torch.bfloat16)
        waits.found.clear()
        assert tower(torch.empty(2, 9, dtype=torch.int64)).device.type == "cuda"
    assert waits.found == []
    tower, ids = ClipText(**sizes), torch.randint(50, (2, 9))
    compiled = torch.compile(tower, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(ids), tower(ids))


class OneBatch:
    """A loader of the same clips over and over."""

    def __init__(self) -> None:
        self.batch = {"video": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8), "index": torch.arange(2)}

    def __len__(self) -> int:
        return 100

    def state_dict(self) -> dict:
        return {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(lambda: self.batch, None)


def on_gpu(settings: Stage1Config, out: Path, cuda_graph: bool) -> tuple[Trainer, Callable[[int], None]]:
    """A trainer on a GPU, and what makes so many of its steps."""
    settings.run.device, settings.run.out, settings.run.cuda_graph = "cuda", str(out), cuda_graph
    trainer = Trainer(settings.run, settings.optim, UnmaskedAlignment(settings), OneBatch())
    step, batches = trainer._wrapped(), Feed(trainer.loader, trainer.lane, trainer.ring)

    def advance(steps: int) -> None:
        for _ in range(steps):
            trainer._train_step(step, batches, 0)

    return trainer, advance


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_on_a_real_gpu_never_waits(cuda_graph: bool, tmp_path: Path) -> None:
    trainer, advance = on_gpu(config(14), tmp_path, cuda_graph)
    advance(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        advance(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = [entry["values"]["loss"].item() for entry in trainer.pending]
    assert len(set(rows)) == 5, "each step draws another mask"


@pytest.mark.gpu
def test_a_recorded_run_equals_an_eager_one(tmp_path: Path) -> None:
    found = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        trainer, advance = on_gpu(config(16), tmp_path, cuda_graph)
        advance(4)
        found.append(torch.stack([entry["values"]["loss"] for entry in trainer.pending]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
