"""The kinds of training. Importing this package makes them known; see base.py."""

from umt_fast.tasks import classification, pretraining, video_text
from umt_fast.tasks.base import (
    TASKS,
    EvalOptions,
    Loader,
    Objective,
    Task,
    Validation,
    check_used,
    register,
    task_named,
    task_of,
    validation_of,
)

__all__ = [
    "TASKS",
    "EvalOptions",
    "Loader",
    "Objective",
    "Task",
    "Validation",
    "check_used",
    "classification",
    "pretraining",
    "register",
    "task_named",
    "task_of",
    "validation_of",
    "video_text",
]
