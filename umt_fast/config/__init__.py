"""Typed run configurations: what a recipe page returns and what the command line may override.

Every field is documented where it stands; a wrong value is refused at construction with the field, the value
and the rule in the message. Shapes and defaults follow Unmasked Teacher (arXiv 2303.16058).
"""

from umt_fast.config.augment import AugmentConfig, FrameRuleName, MixConfig
from umt_fast.config.core import (
    CLIP_TEXT_LENGTH,
    CLIP_TEXT_WORDS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConfigError,
    by_option,
    check_number,
    check_numbers,
    from_dict,
    require,
    to_dict,
)
from umt_fast.config.detection import DetectionConfig, JudgingConfig, KeyFrameConfig
from umt_fast.config.models import (
    MAX_FRAMES,
    AlignConfig,
    MaskConfig,
    Stage2Losses,
    TeacherConfig,
    TeacherPrecision,
    TextConfig,
    VitConfig,
)
from umt_fast.config.question import QuestionConfig
from umt_fast.config.retrieval import RetrievalConfig, RetrievalLosses
from umt_fast.config.run import AttentionBackend, DataConfig, Dtype, LinearBackend, OptimConfig, RunConfig
from umt_fast.config.stages import FinetuneConfig, Stage1Config, Stage2Config
from umt_fast.config.vocabulary import Vocabulary

__all__ = [
    "CLIP_TEXT_LENGTH",
    "CLIP_TEXT_WORDS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_FRAMES",
    "AlignConfig",
    "AttentionBackend",
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "DetectionConfig",
    "Dtype",
    "FinetuneConfig",
    "FrameRuleName",
    "JudgingConfig",
    "KeyFrameConfig",
    "LinearBackend",
    "MaskConfig",
    "MixConfig",
    "OptimConfig",
    "RetrievalConfig",
    "RetrievalLosses",
    "QuestionConfig",
    "RunConfig",
    "Stage1Config",
    "Stage2Config",
    "Stage2Losses",
    "TeacherConfig",
    "TeacherPrecision",
    "TextConfig",
    "VitConfig",
    "Vocabulary",
    "by_option",
    "check_number",
    "check_numbers",
    "from_dict",
    "require",
    "to_dict",
]
