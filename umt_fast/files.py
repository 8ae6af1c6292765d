"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replaces a file as a whole, or leaves it as it was."""
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
