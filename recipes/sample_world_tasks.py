"""Runs on the sample world beside the quickstart's own; they start from its videos and its pre-trained student.

| variant   | what                                                                                              |
|-----------|---------------------------------------------------------------------------------------------------|
| motions   | a detector: which way does the thing in each box move (4 classes)?                                |
| still     | the same model, boxes and steps on the key frame alone, repeated: what a single picture tells     |
| classes   | fine-tuning on motion or scene labels (4 or 24 classes), clips as they are                        |
| augmented | the same steps with the published augmentation; no flip, which would turn left into right         |

`bash recipes/quickstart_classes.sh` trains the last two from pre-training and probes the frozen student.

`bash recipes/quickstart_motions.sh` trains them from pre-training and from scratch, with three seeds, and prints the frame mAP
of each on 480 unseen clips with 1158 boxes. After one pre-training three seeds gave 56.3, 61.1 and 53.0 from pre-training,
and 29.9, 29.0 and 29.0 for `still` from pre-training; two seeds gave 46.9 and 42.2 from scratch. Guessing gives about 25.
"""

from umt_fast.config import (
    AugmentConfig,
    DataConfig,
    DetectionConfig,
    FinetuneConfig,
    KeyFrameConfig,
    MixConfig,
    OptimConfig,
    RunConfig,
    VitConfig,
)

DEFAULT = "motions"


def motions() -> DetectionConfig:
    """Four frames, four apart, around the middle of a clip of two seconds; no mirror, which would turn left into right."""
    return DetectionConfig(
        run=RunConfig(
            batch_size=16, epochs=4, warmup_epochs=0.5, dtype="fp32", log_every=30, keep=1, tensorboard=False
        ),
        data=DataConfig(workers=1),
        clips=KeyFrameConfig(
            movies="whole",
            first_second=0,
            stride=4,
            short_side=48,
            hue=5,
            saturation=13,
            brightness=13,
            mirror=0.0,
            max_boxes=3,
        ),
        student=VitConfig(
            width=96, depth=4, num_heads=3, patch_size=8, image_size=48, num_frames=4, tubelet_size=1, drop_path=0.0
        ),
        optim=OptimConfig(lr=1e-3, min_lr=1e-6, warmup_lr=1e-6, lr_batch=0, betas=(0.9, 0.999), layer_decay=1.0),
        num_classes=4,
        head_scale=1.0,  # .001, the official value, spends half of so short a run on a plateau
    )


def still() -> DetectionConfig:
    """The key frame four times."""
    config = motions()
    config.clips.frames, config.clips.stride = "still", KeyFrameConfig().stride
    return config


def classes() -> FinetuneConfig:
    """The frames and crops of the published protocol's validation in training too; 24 classes, or as many as are named."""
    config = motions()
    return FinetuneConfig(
        run=RunConfig(
            batch_size=16, epochs=40, warmup_epochs=2, dtype="fp32", log_every=100, keep=1, tensorboard=False
        ),
        data=DataConfig(workers=1, flip=False, augment="center"),
        student=config.student,
        optim=config.optim,
        num_classes=24,
        label_smoothing=0.0,
        head_scale=5.0,  # .001, the official value, spends half of so short a run on a plateau
    )


def augmented() -> FinetuneConfig:
    """RandAugment, random crops and erasing, Mixup and CutMix, label smoothing."""
    config = classes()
    config.data = DataConfig(workers=1, flip=False)
    config.augment, config.mix = AugmentConfig(protocol="published"), MixConfig()
    config.label_smoothing = 0.1
    return config
