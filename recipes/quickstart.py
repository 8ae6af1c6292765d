"""The sample world's runs, small enough for two CPU cores: `bash recipes/quickstart.sh` chains them.

| variant          | what                                                                               |
|------------------|------------------------------------------------------------------------------------|
| stage1           | pre-training of the student against the sample world's own small CLIP              |
| motion           | fine-tuning on motion labels (4 classes), from pre-training or from scratch        |
| scene            | linear probe on scene labels (24 classes)                                          |
| stage2           | captions and clips, from the stage-1 weights (only with `--stage2`)                |
| retrieval        | fine-tuning on captions, from the stage-2 weights (see quickstart_captions.sh)     |
| choices          | the same, the best epoch kept by multiple choice                                   |
| questions        | questions about clips, from the stage-2 weights (quickstart_questions.sh)          |
| motion_questions | the same, about motion alone                                                       |

What to expect: docs/measurements.md. Each takes one to five minutes on two cores.
"""

from umt_fast.config import (
    AlignConfig,
    DataConfig,
    FinetuneConfig,
    MaskConfig,
    OptimConfig,
    QuestionConfig,
    RetrievalConfig,
    RunConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TextConfig,
    VitConfig,
)

DEFAULT = "stage1"


def _student() -> VitConfig:
    return VitConfig(
        width=96, depth=4, num_heads=3, patch_size=8, image_size=48, num_frames=4, tubelet_size=1, drop_path=0.0
    )


def stage1() -> Stage1Config:
    """Pre-training: 8 of 36 tokens of each frame stay visible."""
    return Stage1Config(
        run=RunConfig(batch_size=16, epochs=6, warmup_epochs=1, dtype="fp32", log_every=25, tensorboard=False),
        data=DataConfig(workers=2, num_sample=2),
        student=_student(),
        teacher=TeacherConfig(
            width=96, depth=4, num_heads=3, patch_size=8, image_size=48, output_dim=64, weights="untrained"
        ),
        mask=MaskConfig(kind="semantic", ratio=0.8),
        align=AlignConfig(num_layers=2),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, lr_batch=0),
    )


def motion() -> FinetuneConfig:
    """Fine-tuning of all weights; no flip, which would turn left into right."""
    student = _student()
    student.position_grid = student.grid  # pre-training's is the same, and so is that of a start from scratch
    return FinetuneConfig(
        run=RunConfig(batch_size=16, epochs=15, warmup_epochs=2, dtype="fp32", log_every=25, tensorboard=False),
        data=DataConfig(workers=1, flip=False, augment="center"),
        student=student,
        optim=OptimConfig(lr=1e-3, min_lr=1e-6, warmup_lr=1e-6, lr_batch=0),
        num_classes=4,
        label_smoothing=0.0,
        head_scale=5.0,  # .001, the official value, spends half of so short a run on a plateau
    )


def scene() -> FinetuneConfig:
    """A probe: the encoder stays as it is."""
    config = motion()
    config.run.epochs, config.run.warmup_epochs = 5, 1
    config.optim.lr = 1e-2
    config.num_classes, config.freeze = 24, True
    return config


def stage2() -> Stage2Config:
    """Captions and clips together; no flip, which would make "moves left" wrong."""
    pretraining = stage1()
    return Stage2Config(
        run=RunConfig(batch_size=32, epochs=10, warmup_epochs=1, dtype="fp32", log_every=25, tensorboard=False),
        data=DataConfig(workers=2, flip=False, sampling="intervals", augment="random_resized_crop"),
        student=pretraining.student,
        teacher=pretraining.teacher,
        text=TextConfig(width=96, depth=4, fusion_layer=2, num_heads=3, vocab_size=64, max_positions=16, init_std=0.08),
        mask=pretraining.mask,
        align=pretraining.align,
        optim=OptimConfig(
            lr=1e-3, schedule="scaled_cosine", min_factor=0.01, min_lr=0.0, lr_batch=0, weight_decay=0.02
        ),
        embed_dim=64,
        bert="untrained",
        max_length=16,
    )


def retrieval() -> RetrievalConfig:
    """Captions of the clips of stage 2, whole clips now; no flip here either."""
    pretraining = stage2()
    return RetrievalConfig(
        run=RunConfig(batch_size=32, epochs=2, warmup_epochs=0.2, dtype="fp32", log_every=25, tensorboard=False),
        data=DataConfig(workers=1, flip=False, sampling="intervals", augment="random_resized_crop"),
        student=pretraining.student,
        text=pretraining.text,
        optim=pretraining.optim,
        embed_dim=pretraining.embed_dim,
        max_length=pretraining.max_length,
    )


def choices() -> RetrievalConfig:
    """The same, half as long."""
    config = retrieval()
    config.run.epochs, config.validate = 1, "choices"
    return config


def questions() -> QuestionConfig:
    """Questions about the clips of stage 2; no flip here either."""
    pretraining = stage2()
    return QuestionConfig(
        run=RunConfig(batch_size=32, epochs=4, warmup_epochs=0.5, dtype="fp32", log_every=25, tensorboard=False),
        data=DataConfig(workers=1, flip=False, sampling="intervals", augment="random_resized_crop"),
        student=pretraining.student,
        text=pretraining.text,
        optim=pretraining.optim,
        max_length=12,
        max_answer=3,
    )


def motion_questions() -> QuestionConfig:
    """Seven times as many questions about motion as in `questions`, at a third of its rate: at the whole rate they are not
    learned, and a quarter of the steps would not be enough."""
    config = questions()
    config.run.epochs = 12
    config.optim.lr = 3e-4
    return config
