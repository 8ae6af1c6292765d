"""Stage-2 pre-training on captioned clips and images (paper section 4.1; the official stage-2 scripts).

    VIDEOS and images: see stage2_5m.sh, stage2_17m.sh and stage2_25m.sh beside this page

What the official runs reached, zero-shot text-to-video R@1 with re-ranking, 4 frames (model zoo figures):

| variant | corpus | MSRVTT | DiDeMo | ActivityNet | LSMDC | MSVD |
|---------|--------|--------|--------|-------------|-------|------|
| b16     | 5M     | 29.6   | 33.4   | 28.3        | 16.8  | 36.2 |
| b16     | 17M    | 35.5   | 41.9   | 33.8        | 18.1  | 41.4 |
| b16     | 25M    | 35.2   | 41.2   | 35.5        | 19.1  | 42.3 |
| l16     | 5M     | 33.3   | 34.0   | 31.9        | 20.0  | 44.4 |
| l16     | 17M    | 42.6   | 46.4   | 42.8        | 25.2  | 49.9 |
| l16     | 25M    | 40.7   | 48.6   | 41.9        | 24.9  | 49.0 |

This repository has not repeated the runs. The official scripts use 16 GPUs for b16 and 32 for l16, each with batches of 128
clips or 128 images; the rate is not scaled with the batch.
"""

from umt_fast.config import (
    AlignConfig,
    DataConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
    Stage2Config,
    Stage2Losses,
    TextConfig,
)
from umt_fast.models.sizes import student_size, teacher_size

DEFAULT = "b16"


def b16() -> Stage2Config:
    """ViT-B/16 and BERT base."""
    return Stage2Config(
        run=RunConfig(
            batch_size=128,  # clips, or images, per GPU and step
            epochs=10,
            warmup_epochs=1,
            dtype="bf16",  # official: fp16 with a loss scaler
            seed=42,
            save_every=1000,
            keep=2,
        ),
        data=DataConfig(sampling="intervals", num_sample=1, augment="random_resized_crop", flip=True, workers=12),
        student=student_size("b16", image_size=224, num_frames=4, tubelet_size=1, drop_path=0.1),
        teacher=teacher_size("clip_b16", weights="ViT-B-16:openai"),
        text=TextConfig(width=768, depth=12, fusion_layer=9, num_heads=12),
        mask=MaskConfig(kind="semantic", ratio=0.8),
        image_mask=MaskConfig(kind="semantic", ratio=0.5),
        align=AlignConfig(num_layers=6),
        losses=Stage2Losses(vtc=1.0, vtm=1.0, mlm=1.0, uta=1.0, gather="official"),
        same_sample="row",  # other captions of a picture are wrong answers
        optim=OptimConfig(
            lr=1e-4,
            schedule="scaled_cosine",  # from and to a hundredth of lr
            min_factor=0.01,
            min_lr=0.0,
            lr_batch=0,  # not scaled
            betas=(0.9, 0.999),
            weight_decay=0.02,
            clip_grad=0.0,
        ),
        embed_dim=512,
        bert="bert-base-uncased",
        tokenizer="bert-base-uncased",
        max_length=32,
        sep_token=False,
        mask_words=0.5,
    )


def l16() -> Stage2Config:
    """ViT-L/16 and BERT large."""
    config = b16()
    config.student = student_size("l16", image_size=224, num_frames=4, tubelet_size=1, drop_path=0.2)
    config.teacher = teacher_size("clip_l14", weights="ViT-L-14:openai")
    config.text = TextConfig(width=1024, depth=24, fusion_layer=19, num_heads=16)
    config.embed_dim, config.bert, config.tokenizer = 768, "bert-large-uncased", "bert-large-uncased"
    return config
