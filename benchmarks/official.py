"""Times the official code itself: `python -m benchmarks.official stage1 --folder unmasked_teacher [...]`; one JSON line.

FOLDER is the user's copy of github.com/OpenGVLab/unmasked_teacher. Its own models and its own training loop run, with
random weights, on one batch that is on the device already; `bench stage1` prints the same keys of our steps, and `finetune`
likewise. It needs timm 0.4.12. Three changes, none inside the step's arithmetic: the loop's fp16 autocast becomes the one
asked for; the gradient scaler is kept for fp16 alone; and without a GPU the loop's wait for one does nothing. The published
fine-tuning ran under deepspeed, all in fp16; here its loop takes its other way, by autocast.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import math
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from torch import Tensor, nn

from umt_fast.bench.finetune import finetune_config, flops_of
from umt_fast.bench.measure import Case, Clock, Model, Steps, autocast, checked_case, normalized, random_video
from umt_fast.bench.stage1 import stage1_config
from umt_fast.config import ConfigError, FinetuneConfig, Stage1Config, VitConfig
from umt_fast.tasks.pretraining import UnmaskedAlignment

TIMM = "0.4.12"
STAGE1, FINETUNE = "engines.engine_for_pretraining_umt", "engines.engine_for_finetuning"


def load(folder: Path, engine: str = STAGE1) -> Namespace:
    """The official modules: models, engine, utils, optimizers. Raises ConfigError where they cannot be imported."""
    root = folder / "single_modality"
    if not (root / "run_umt_pretraining.py").is_file():
        raise ConfigError(
            f"folder is {folder}, which holds no single_modality/run_umt_pretraining.py; clone "
            "github.com/OpenGVLab/unmasked_teacher and name that folder"
        )
    found = importlib.util.find_spec("timm") and importlib.import_module("timm").__version__
    if found != TIMM:
        raise ConfigError(f"the official code needs timm {TIMM}, found {found or 'none'}; pip install timm=={TIMM}")
    # What the official modules name but a step never calls, and what torch has dropped since.
    _provide("torch._six", inf=math.inf)
    _provide("tensorboardX", SummaryWriter=None)
    _provide("einops", rearrange=None)
    _provide("scipy")
    _provide("scipy.special", softmax=None)
    # Its package of readers would ask for decord; of these a step needs `mixup` alone.
    readers, others = types.ModuleType("datasets"), sys.modules.get("datasets")
    readers.__path__ = [str(root.resolve() / "datasets")]
    sys.path.insert(0, str(root.resolve()))
    sys.modules["datasets"] = readers
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            modules = [importlib.import_module(name) for name in ("models", engine, "utils", "optim_factory")]
    except ImportError as error:
        raise ConfigError(f"the official code does not import: {error}") from error
    finally:
        sys.path.pop(0)
        del sys.modules["datasets"]
        if others is not None:
            sys.modules["datasets"] = others
    for module in modules:
        if not Path(module.__file__).is_relative_to(root.resolve()):
            raise ConfigError(f"a module of the official code's name is already there: {module.__file__}; move it away")
    return Namespace(**dict(zip(("models", "engine", "utils", "optimizers"), modules, strict=True)))


def _provide(name: str, **attributes: object) -> None:
    """A module of that name with these attributes, unless there is one."""
    above = name.rpartition(".")[0]
    lacks = above in sys.modules and not hasattr(sys.modules[above], "__path__")
    if name not in sys.modules and (lacks or importlib.util.find_spec(name) is None):
        sys.modules[name] = module = types.ModuleType(name)
        vars(module).update(attributes)


def tower_options(vit: VitConfig) -> dict[str, Any]:
    """What the official student and classifier both take under one name."""
    return {
        "img_size": vit.image_size,
        "patch_size": vit.patch_size,
        "mlp_ratio": vit.mlp_ratio,
        "qkv_bias": True,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
        "drop_path_rate": vit.drop_path,
        "tubelet_size": vit.tubelet_size,
    }


def build(official: Namespace, config: Stage1Config) -> tuple[nn.Module, nn.Module]:
    """Student and teacher of the configuration's sizes, as the official functions for B/16 and L/16 build them."""
    vit, teacher, layers = config.student, config.teacher, config.align.num_layers
    student_class = sys.modules[official.models.pretrain_umt_base_patch16_224.__module__].PretrainVisionTransformer
    teacher_class = sys.modules[official.models.clip_b16.__module__].VisionTransformer
    student = student_class(
        **tower_options(vit),
        encoder_embed_dim=vit.width,
        encoder_depth=vit.depth,
        encoder_num_heads=vit.num_heads,
        num_frames=vit.num_frames,
        clip_decoder_embed_dim=vit.width,
        clip_output_dim=teacher.output_dim,
        clip_norm_type=config.align.normalize,
        clip_return_layer=layers,
    )
    frozen = teacher_class(
        input_resolution=teacher.image_size,
        patch_size=teacher.patch_size,
        width=teacher.width,
        layers=teacher.depth,
        heads=teacher.num_heads,
        output_dim=teacher.output_dim,
        clip_norm_type=config.align.normalize,
        return_attn=True,
        clip_return_layer=layers,
    )
    return student, frozen.eval()


class Unscaled:
    """In place of the official gradient scaler where gradients need none: backward, gradient norm, update."""

    def __init__(self, norm: Callable[[Any], Tensor]) -> None:
        self.norm = norm

    def __call__(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        parameters: Any = None,
        create_graph: bool = False,
        update_grad: bool = True,
    ) -> Tensor:
        loss.backward(create_graph=create_graph)
        norm = self.norm(parameters)
        optimizer.step()
        return norm

    def state_dict(self) -> dict[str, float]:
        return {"scale": 1.0}


@contextlib.contextmanager
def told(device: torch.device, dtype: str) -> Iterator[None]:
    """The official loop's autocast is that of `dtype`; where there is no GPU, it waits for none."""
    with contextlib.ExitStack() as stack:
        if dtype != "fp16":
            stack.enter_context(mock.patch("torch.cuda.amp.autocast", lambda: autocast(device, dtype)))
        if device.type != "cuda":
            stack.enter_context(mock.patch("torch.cuda.synchronize", lambda: None))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def official_steps(official: Namespace, config: Stage1Config, video: Tensor, device: torch.device, dtype: str) -> Steps:
    """The official training loop over one batch a call; fp32 video (B, 3, T, H, W)."""
    torch.backends.cudnn.benchmark = True  # as the official script sets it
    with contextlib.redirect_stdout(io.StringIO()):
        student, teacher = (module.to(device) for module in build(official, config))
        asked = Namespace(opt="adamw", lr=1e-4, weight_decay=config.optim.weight_decay, opt_betas=config.optim.betas)
        optimizer = official.optimizers.create_optimizer(asked, student)
    norm = official.utils.get_grad_norm_
    scaler = official.utils.NativeScalerWithGradNormCount() if dtype == "fp16" else Unscaled(norm)
    batch = [(video, torch.zeros(0))]  # the loader's mask is not looked at in this mode

    def step(number: int) -> None:
        with told(device, dtype):
            official.engine.train_one_epoch(
                student,
                batch,
                optimizer,
                device,
                0,
                scaler,
                None,
                start_steps=0,
                lr_schedule_values=[1e-4],
                wd_schedule_values=[config.optim.weight_decay],
                teacher_model=teacher,
                clip_input_resolution=config.teacher.image_size,
                clip_loss_type=config.align.loss,
                clip_loss_ratio=1.0,
                mask_type="attention",
                mask_ratio=config.mask.ratio,
            )

    return step, timed_by(
        step,
        {
            "teacher": teacher.register_forward_hook,
            "mask": student.register_forward_pre_hook,
            "student forward": student.register_forward_hook,
            "loss and backward": optimizer.register_step_pre_hook,
        },
    )


def timed_by(step: Callable[[int], None], ends: dict[str, Callable[..., Any]]) -> Callable[[int, Clock], None]:
    """A step with a clock: ends names its parts, the last one apart, and registers a hook where each ends."""

    def timed(number: int, clock: Clock) -> None:
        hooks = [register(lambda *_, part=part: clock.lap(part)) for part, register in ends.items()]
        clock.restart()
        step(number)
        clock.lap("optimizer")
        for hook in hooks:
            hook.remove()

    return timed


def classifier_of(official: Namespace, config: FinetuneConfig) -> nn.Module:
    """The classifier of the configuration's sizes, as the official functions for B/16 and L/16 build it."""
    vit = config.student
    kind = sys.modules[official.models.vit_base_patch16_224.__module__].VisionTransformer
    return kind(
        **tower_options(vit),
        num_classes=config.num_classes,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.num_heads,
        init_scale=config.head_scale,
        all_frames=vit.num_frames,
        use_checkpoint=vit.checkpoint_blocks > 0,
        checkpoint_num=vit.checkpoint_blocks,
        use_mean_pooling=True,
    )


def finetune_steps(
    official: Namespace, config: FinetuneConfig, video: Tensor, device: torch.device, dtype: str
) -> Steps:
    """The official fine-tuning loop over one batch a call; fp32 video (B, 3, T, H, W)."""
    torch.backends.cudnn.benchmark = True  # as the official script sets it
    optim, depth = config.optim, config.student.depth
    with contextlib.redirect_stdout(io.StringIO()):
        model = classifier_of(official, config).to(device)
        scales = [optim.layer_decay ** (depth + 1 - layer) for layer in range(depth + 2)]
        assigner = official.optimizers.LayerDecayValueAssigner(scales)
        asked = Namespace(
            opt="adamw", lr=optim.lr, weight_decay=optim.weight_decay, opt_betas=optim.betas, opt_eps=optim.eps
        )
        optimizer = official.optimizers.create_optimizer(
            asked,
            model,
            skip_list=model.no_weight_decay(),
            get_num_layer=assigner.get_layer_id,
            get_layer_scale=assigner.get_scale,
        )
    scaler = official.utils.NativeScalerWithGradNormCount() if dtype == "fp16" else None
    mix = official.engine.Mixup(
        mixup_alpha=config.mix.mixup_alpha,
        cutmix_alpha=config.mix.cutmix_alpha,
        prob=config.mix.probability,
        switch_prob=config.mix.switch,
        mode="batch",
        label_smoothing=config.label_smoothing,
        num_classes=config.num_classes,
    )
    batch = [(video, torch.arange(len(video), device=device), None, None)]

    def step(number: int) -> None:
        with told(device, dtype):
            official.engine.train_one_epoch(
                model,
                importlib.import_module("timm.loss").SoftTargetCrossEntropy(),
                batch,
                optimizer,
                device,
                0,
                scaler or Unscaled(official.utils.get_grad_norm_),
                None,
                mixup_fn=mix,
                start_steps=0,
                lr_schedule_values=[optim.lr],
                wd_schedule_values=[optim.weight_decay],
                num_training_steps_per_epoch=1,
                update_freq=1,
            )

    return step, timed_by(
        step,
        {
            "mixing": model.register_forward_pre_hook,
            "classifier forward": model.register_forward_hook,
            "loss and backward": optimizer.register_step_pre_hook,
        },
    )


def check(folder: Path) -> None:
    """Say whether the official code can be timed here: nothing printed if it can.

    Args:
        folder: The user's copy of github.com/OpenGVLab/unmasked_teacher.
    """
    load(folder)


def official_case(model: Model, batch_size: int, device: str, dtype: str, steps: int) -> Case:
    """What is timed. Raises ConfigError."""
    case = checked_case(
        model=model, batch_size=batch_size, device=device, dtype=dtype, implementation="official", steps=steps
    )
    if dtype == "fp16" and case.device.type != "cuda":
        raise ConfigError("dtype is fp16, which a CPU does not train in; use bf16 or fp32")
    return case


def stage1(
    folder: Path,
    model: Model = "b16",
    batch_size: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    steps: int = 5,
) -> None:
    """Time the official stage-1 training step on random clips; one JSON line, with the keys of `bench stage1`.

    Args:
        folder: The user's copy of github.com/OpenGVLab/unmasked_teacher.
        model: Student; the teacher is the official one of that size. Weights are random.
        batch_size: Clips per step.
        device: Where; auto takes a GPU if there is one.
        dtype: Of autocast; the official script's own is fp16, which needs a GPU. A CPU without bf16 instructions computes
            in fp32 (see `computed_in`).
        steps: Timed steps, after two that are not.
    """
    case = official_case(model, batch_size, device, dtype, steps)
    official = load(folder)
    config = stage1_config(model, batch_size, "fp32" if dtype == "fp32" else "bf16")
    vit = config.student
    video = normalized(random_video(batch_size, vit.num_frames, vit.image_size, case.device))
    flops = UnmaskedAlignment.flops_of(config) * batch_size
    print(
        json.dumps(
            case.measure(
                "stage1", lambda: official_steps(official, config, video, case.device, case.computed_in), flops
            )
        )
    )


def finetune(
    folder: Path,
    model: Model = "b16",
    batch_size: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    steps: int = 5,
    frames: int = 8,
    image_size: int | None = None,
    checkpoint_blocks: int = 0,
) -> None:
    """Time the official fine-tuning step on random clips; one JSON line, with the keys of `bench finetune`.

    Args:
        folder: The user's copy of github.com/OpenGVLab/unmasked_teacher.
        model: The classifier's tower. Weights are random.
        batch_size: Clips per step, an even number: the official Mixup takes no other.
        device: Where; auto takes a GPU if there is one.
        dtype: Of autocast; the official script's own is fp16, which needs a GPU. A CPU without bf16 instructions computes
            in fp32 (see `computed_in`).
        steps: Timed steps, after two that are not.
        frames: Frames of a clip.
        image_size: Height and width of a clip; left out: 224, or 64 for tiny.
        checkpoint_blocks: Blocks whose activations are computed again.
    """
    case = official_case(model, batch_size, device, dtype, steps)
    if batch_size % 2:
        raise ConfigError(f"batch_size is {batch_size}; the official Mixup needs an even number")
    config = finetune_config(
        model, batch_size, "fp32" if dtype == "fp32" else "bf16", frames, image_size, checkpoint_blocks
    )
    official, vit = load(folder, FINETUNE), config.student
    video = normalized(random_video(batch_size, frames, vit.image_size, case.device))
    found = case.measure(
        "finetune",
        lambda: finetune_steps(official, config, video, case.device, case.computed_in),
        flops_of(config) * batch_size,
    )
    about = {"frames": frames, "image_size": vit.image_size, "checkpoint_blocks": checkpoint_blocks}
    print(json.dumps(found | about))


if __name__ == "__main__":
    try:
        commands = {"stage1": stage1, "finetune": finetune, "check": check}
        tyro.extras.subcommand_cli_from_dict(commands, use_underscores=True)
    except ConfigError as error:
        sys.exit(f"benchmarks.official: {error}")
