"""What run.tune found on this machine before: one JSON file for each key, in a folder that outlives the runs.

$UMT_CACHE, else $XDG_CACHE_HOME/umt_fast, else ~/.cache/umt_fast. A key names everything the fastest way may depend on, so
a new driver, torch, GPU, batch size or line of code finds nothing and measures anew.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import torch

import umt_fast
from umt_fast.files import checksum, write_json

log = logging.getLogger("umt_fast")

# Libraries that compute parts of a step.
_LIBRARIES = ("triton", "flash-attn", "xformers", "apex")
# Where the kernel module says its version.
_DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")


def cache_folder() -> Path:
    """Where results are kept, made or not."""
    if os.environ.get("UMT_CACHE"):
        return Path(os.environ["UMT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umt_fast"


def driver_version() -> str:
    """The NVIDIA driver's version as its kernel module says it; `unknown` where it does not, or there is none."""
    for name in _DRIVER_FILES:
        try:
            return Path(name).read_text().splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    return "unknown"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def code_hash() -> str:
    """Of every Python file of umt_fast and kernels: a version number does not change with each line."""
    parts = []
    for package in ("umt_fast", "kernels"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            parts += [str(path.relative_to(root)).encode() + b"\0", path]
    return checksum(parts)[:16]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def machine(device: torch.device) -> dict[str, Any]:
    """What of this machine and its software a result holds for."""
    found = {"device": device_name(device), "torch": torch.__version__, "umt_fast": umt_fast.__version__}
    found |= {name: _version(name) for name in _LIBRARIES} | {"code": code_hash()}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return found | {"driver": driver_version(), "cuda": torch.version.cuda, "memory": memory}
    return found | {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def path_of(key: dict[str, Any]) -> Path:
    """The file of a key."""
    return cache_folder() / "tune" / f"{checksum(json.dumps(key, sort_keys=True).encode())}.json"


def read(key: dict[str, Any]) -> dict[str, Any] | None:
    """What was stored under a key: `choice` {setting: value} and `candidates`; None where nothing was.

    A damaged file is named in a warning and taken for none.
    """
    path = path_of(key)
    try:
        entry = json.loads(path.read_text())
        if entry["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of another key")
        if not isinstance(entry["choice"], dict) or not isinstance(entry["candidates"], list):
            raise ValueError("choice or candidates is missing")
        return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("WARNING: run.tune cannot use %s (%s); measuring anew", path, " ".join(str(error).split()))
        return None


def write(key: dict[str, Any], choice: dict[str, Any], candidates: list[dict[str, Any]]) -> None:
    """Keeps a result under its key; where that cannot be, a warning says so."""
    path = path_of(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "choice": choice, "candidates": candidates}, indent=1, shared=True)
    except OSError as error:
        log.warning(
            "WARNING: run.tune cannot keep its result in %s (%s); set UMT_CACHE to a folder that can be written",
            path.parent,
            getattr(error, "reason", error.strerror),
        )
