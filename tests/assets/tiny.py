"""A stage-1 run of seconds, for tests of the command line."""

import dataclasses

from umt_fast.config import (
    AlignConfig,
    DataConfig,
    FinetuneConfig,
    RetrievalConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TextConfig,
    VitConfig,
)

DEFAULT = "tiny"


def tiny() -> Stage1Config:
    """Three steps of a two-block student under an untrained teacher."""
    return Stage1Config(
        run=RunConfig(
            batch_size=2,
            epochs=3,
            warmup_epochs=1,
            max_steps=3,
            dtype="fp32",
            device="cpu",
            log_every=1,
            tensorboard=False,
        ),
        data=DataConfig(workers=0),
        student=VitConfig(width=32, depth=2, num_heads=2, image_size=32, num_frames=4),
        teacher=TeacherConfig(
            width=32, depth=2, num_heads=2, patch_size=16, image_size=32, output_dim=16, weights="untrained"
        ),
        align=AlignConfig(num_layers=2),
    )


def long() -> Stage1Config:
    """Twenty-four steps with a checkpoint every third."""
    config = tiny()
    config.run.max_steps, config.run.save_every, config.run.epochs = 24, 3, 50
    return config


def classes() -> FinetuneConfig:
    """Three steps of fine-tuning the same student on two classes."""
    pretraining = tiny()
    pretraining.run.epochs = 30
    return FinetuneConfig(
        run=pretraining.run, data=pretraining.data, student=pretraining.student, num_classes=2, head_scale=1.0
    )


def captions() -> Stage2Config:
    """Three steps of stage 2 on the same student and teacher."""
    pretraining = tiny()
    pretraining.run.epochs, pretraining.run.save_every = 30, 2
    return Stage2Config(
        run=pretraining.run,
        data=pretraining.data,
        student=pretraining.student,
        teacher=pretraining.teacher,
        align=pretraining.align,
        bert="untrained",
        embed_dim=8,
        max_length=6,
        text=TextConfig(width=32, depth=2, fusion_layer=1, num_heads=2, vocab_size=16, max_positions=8),
    )


def long_captions() -> Stage2Config:
    """Twenty-four steps with a checkpoint every third."""
    config = captions()
    config.run.max_steps, config.run.save_every, config.run.epochs = 24, 3, 50
    return config


def pairs() -> RetrievalConfig:
    """Three steps of fine-tuning that model for retrieval, on twice its frames."""
    stage2 = captions()
    student = dataclasses.replace(stage2.student, num_frames=8)
    return RetrievalConfig(
        run=stage2.run, data=stage2.data, student=student, text=stage2.text, embed_dim=8, max_length=6
    )
