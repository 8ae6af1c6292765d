"""The kinds of training. Importing this package makes them known; see base.py."""

from umt_fast.tasks import classification, detection, pretraining, video_text
from umt_fast.tasks.base import TASKS, EvalOptions, Loader, Objective, Task, check_used, register, task_named, task_of

__all__ = [
    "TASKS",
    "EvalOptions",
    "Loader",
    "Objective",
    "Task",
    "check_used",
    "classification",
    "detection",
    "pretraining",
    "register",
    "task_named",
    "task_of",
    "video_text",
]
