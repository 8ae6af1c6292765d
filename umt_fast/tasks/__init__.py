"""The kinds of training. Importing this package makes them known; see base.py."""

from umt_fast.tasks import classification, pretraining, retrieve, video_text
from umt_fast.tasks.base import (
    EVALUATIONS,
    TASKS,
    EvalOptions,
    Evaluation,
    Loader,
    Objective,
    Task,
    Validation,
    check_used,
    evaluation_named,
    evaluations_of,
    register,
    register_evaluation,
    task_named,
    task_of,
    validation_of,
)

__all__ = [
    "EVALUATIONS",
    "TASKS",
    "EvalOptions",
    "Evaluation",
    "Loader",
    "Objective",
    "Task",
    "Validation",
    "check_used",
    "classification",
    "evaluation_named",
    "evaluations_of",
    "pretraining",
    "register",
    "register_evaluation",
    "retrieve",
    "task_named",
    "task_of",
    "validation_of",
    "video_text",
]
