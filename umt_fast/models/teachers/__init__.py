"""The frozen towers that stages 1 and 2 learn from: importing this package makes each kind known; see base.py."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

from umt_fast.models.teachers.base import (  # noqa: E402
    TEACHER_KINDS,
    Teacher,
    TeacherOutput,
    build_teacher,
    load_teacher,
    register,
    teacher_kind,
)

__all__ = [
    "TEACHER_KINDS",
    "Teacher",
    "TeacherOutput",
    "build_teacher",
    "load_teacher",
    "register",
    "teacher_kind",
]
