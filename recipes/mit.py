r"""Fine-tuning on Moments in Time V1 from a model fine-tuned on Kinetics-400 (the four official scripts).

    RECIPE=mit MODEL=b16 DATA=train.csv VAL=val.csv INIT=k400.safetensors OUT=runs/mit bash recipes/finetune.sh
    RECIPE=mit MODEL=b16_384 DATA=train.csv VAL=val.csv INIT=runs/mit/checkpoint-best.pt OUT=runs/mit384 \
        bash recipes/finetune.sh

| variant | GPUs x batch | epochs (warm-up) | rate | decay | drop path | layer decay | recomputed | views | top-1 |
|---------|--------------|------------------|------|-------|-----------|-------------|------------|-------|-------|
| b16     | 16 x 32      | 40 (5)           | 1e-4 | .05   | .1        | .75         | 0          | 4 x 3 | 44.6  |
| l16     | 16 x 32      | 20 (5)           | 1e-4 | .05   | .2        | .85         | 12         | 4 x 3 | 48.0  |
| b16_384 | 16 x 16      | 4 (1)            | 1e-5 | .1    | .1        | .75         | 8          | 4 x 3 | 45.5  |
| l16_384 | 16 x 8       | 4 (1)            | 1e-5 | .1    | .2        | .85         | 18         | 6 x 3 | 48.7  |

Each clip is augmented once in a step. The official scripts name other weights to start from, the two kinds seemingly swapped.

Those are the official figures; this repository has not repeated the runs. Rates are for 256 views and are scaled with
the views of a step (GPUs x batch x augmentations): here to a peak of 2e-4 at 224 pixels, 1e-5 (b16_384) and 5e-6
(l16_384). On fewer GPUs keep that product with `--run.accumulate`. A validation list is judged after every epoch by
one view of each clip, and the best weights are kept as checkpoint-best.pt. The official test:

    python -m umt_fast eval classify runs/mit/checkpoint-best.pt test.csv --segments 4 --crops 3
"""

from umt_fast.config import AugmentConfig, DataConfig, FinetuneConfig, MixConfig, OptimConfig, RunConfig
from umt_fast.models.sizes import student_size

DEFAULT = "b16"
CLIPS = 802_000
"""Training clips: Moments in Time V1's, about; for `plan` where no list is given."""


def b16() -> FinetuneConfig:
    """ViT-B/16, 8 frames at 224 pixels."""
    return FinetuneConfig(
        run=RunConfig(
            batch_size=32,  # videos per GPU
            accumulate=1,
            epochs=40,
            warmup_epochs=5,
            validate_epochs=1,
            dtype="bf16",  # official: fp16 with a loss scaler; bf16 needs none
            seed=0,
            keep=2,
        ),
        data=DataConfig(separator=" ", num_sample=1, flip=True, workers=12),
        student=student_size("b16", image_size=224, num_frames=8, tubelet_size=1, drop_path=0.1, checkpoint_blocks=0),
        augment=AugmentConfig(
            protocol="published",
            frames="kinetics",
            rand_augment="rand-m7-n4-mstd0.5-inc1",
            interpolation="bicubic",
            crop_area=(0.08, 1.0),
            crop_aspect=(0.75, 1.3333),
            erasing=0.25,
            erasing_mode="pixel",
            erasing_count=1,
        ),
        mix=MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, probability=1.0, switch=0.5, per="batch"),
        optim=OptimConfig(
            lr=1e-4,
            min_lr=1e-6,
            warmup_lr=1e-6,
            lr_batch=256,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.05,
            layer_decay=0.75,
            clip_grad=0.0,
            ema_decay=0.0,
        ),
        num_classes=339,
        init_as="new_head",  # of 339 classes in place of 400
        label_smoothing=0.1,
        head_scale=0.001,
    )


def l16() -> FinetuneConfig:
    """ViT-L/16, 8 frames at 224 pixels."""
    config = b16()
    config.run.epochs = 20
    config.student = student_size(
        "l16", image_size=224, num_frames=8, tubelet_size=1, drop_path=0.2, checkpoint_blocks=12
    )
    config.optim.layer_decay = 0.85
    return config


def b16_384() -> FinetuneConfig:
    """ViT-B/16 at 384 pixels: a short continuation of b16, the position table resized."""
    return _at_384(b16(), batch_size=16, checkpoint_blocks=8)


def l16_384() -> FinetuneConfig:
    """ViT-L/16 at 384 pixels: a short continuation of l16."""
    return _at_384(l16(), batch_size=8, checkpoint_blocks=18)


def _at_384(config: FinetuneConfig, batch_size: int, checkpoint_blocks: int) -> FinetuneConfig:
    config.run.batch_size, config.run.epochs, config.run.warmup_epochs = batch_size, 4, 1
    config.student.image_size, config.student.checkpoint_blocks = 384, checkpoint_blocks
    config.optim.lr, config.optim.weight_decay = 1e-5, 0.1
    config.init_as = "classifier"  # with its head
    return config
