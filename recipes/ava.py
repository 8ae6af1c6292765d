"""Action detection on AVA 2.2 (the official scripts of single_modality/action_detection).

    DATA=ava_train_v2.2.csv MOVIES=movies INIT=b16_ptk710_ftk710_f8_res224.pth OUT=runs/ava bash recipes/ava.sh
    python -m umt_fast eval detect runs/ava/checkpoint-00024000.pt ava_val_v2.2.csv --boxes ava_val_boxes.csv --root movies \\
        --label_map ava_action_list_v2.2_for_activitynet_2019.pbtxt --excluded ava_val_excluded_timestamps_v2.2.csv

DATA is AVA's ground truth, or the annotations (.json) of the official detection code. MOVIES holds MOVIE/SECOND.mp4
(--clips.movies seconds, as officially), extracted frames MOVIE/MOVIE_000001.jpg (frames) or MOVIE.mp4 (whole). The boxes of
the evaluation are a person detector's, of score .8 or more.

| variant  | starts from                       | GPUs x batch | published frame mAP at IoU 0.5 |
|----------|-----------------------------------|--------------|--------------------------------|
| b16      | Kinetics-710, trained and tuned   | 16 x 8       | 33.5 (model zoo)               |
| l16      | Kinetics-710, trained and tuned   | 32 x 4       | 39.8 (model zoo)               |
| b16_k400 | Kinetics-400, trained and tuned   | 16 x 8       | 32.7 (paper)                   |
| l16_k400 | Kinetics-400, trained and tuned   | 32 x 4       | 39.0 (paper)                   |

This repository has not repeated the runs. The K400 variants have no published script: they are the others' settings with other
weights, which INIT names. Which frames the published runs saw is not known either: the scripts say --sparse, whose released
code takes a window of 64 frames, and whose description spreads the frames over 300: --clips.frames described.
"""

from umt_fast.config import DataConfig, DetectionConfig, KeyFrameConfig, OptimConfig, RunConfig
from umt_fast.models.sizes import student_size

DEFAULT = "b16"


def b16() -> DetectionConfig:
    """ViT-B/16."""
    return DetectionConfig(
        run=RunConfig(
            batch_size=8,  # per GPU; 16 GPUs
            epochs=30,
            warmup_epochs=5,
            dtype="bf16",  # official: fp16 with a loss scaler
            seed=0,
            save_every=1000,
            keep=2,
            keep_every_epochs=10,
        ),
        data=DataConfig(workers=10),
        clips=KeyFrameConfig(
            movies="seconds",
            sparse=True,
            frames="released",
            stride=8,
            short_side=256,
            hue=10,  # of 180
            saturation=26,  # of 255
            brightness=26,
            mirror=0.5,
            max_boxes=100,
        ),
        student=student_size("b16", image_size=224, num_frames=8, tubelet_size=1, drop_path=0.2),
        optim=OptimConfig(
            lr=2.5e-4,  # for 256 clips a step, scaled with what a step has
            min_lr=1e-6,
            warmup_lr=1e-6,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            layer_decay=0.75,
            clip_grad=0.0,
        ),
        num_classes=80,
        head_scale=0.001,
    )


def l16() -> DetectionConfig:
    """ViT-L/16, in fp32, as officially for stability."""
    config = b16()
    config.student = student_size("l16", image_size=224, num_frames=8, tubelet_size=1, drop_path=0.4)
    config.run.batch_size = 4  # 32 GPUs
    config.run.epochs, config.run.keep_every_epochs = 25, 5
    config.run.dtype, config.run.seed = "fp32", 6666
    config.optim.layer_decay = 0.85
    return config


def b16_k400() -> DetectionConfig:
    """ViT-B/16 from Kinetics-400: the same settings, other weights."""
    return b16()


def l16_k400() -> DetectionConfig:
    """ViT-L/16 from Kinetics-400: the same settings, other weights."""
    return l16()
