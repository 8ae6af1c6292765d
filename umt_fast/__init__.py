"""Training of Unmasked Teacher video foundation models, and the models to be used.

    model = umt_fast.load_model(weights="student.safetensors")
    model.features("clip.mp4").pooled

Functions are imported when they are first asked for: torch takes seconds, `import umt_fast` does not.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

TYPE_CHECKING = False  # type checkers take it for true; importing typing would take longer than all the rest
if TYPE_CHECKING:
    from umt_fast.config import ConfigError
    from umt_fast.data.sources.clip import DataError
    from umt_fast.hub import from_pretrained, load_model, load_teacher
    from umt_fast.models.outputs import Features, Predictions
    from umt_fast.models.weights import WeightsError
    from umt_fast.pretrained import (
        Answer,
        ClassifierModel,
        DetectorModel,
        PretrainedModel,
        QuestionAnsweringModel,
        StudentModel,
        TunedVideoTextModel,
        VideoTextModel,
    )
    from umt_fast.zoo import list_models

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "ClassifierModel",
    "ConfigError",
    "DataError",
    "DetectorModel",
    "Features",
    "Predictions",
    "PretrainedModel",
    "QuestionAnsweringModel",
    "StudentModel",
    "TunedVideoTextModel",
    "VideoTextModel",
    "WeightsError",
    "from_pretrained",
    "list_models",
    "load_model",
    "load_teacher",
]

_MODULES = {
    "config": ("ConfigError",),
    "data.sources.clip": ("DataError",),
    "hub": ("from_pretrained", "load_model", "load_teacher"),
    "models.outputs": ("Features", "Predictions"),
    "models.weights": ("WeightsError",),
    "pretrained": (
        "Answer",
        "ClassifierModel",
        "DetectorModel",
        "PretrainedModel",
        "QuestionAnsweringModel",
        "StudentModel",
        "TunedVideoTextModel",
        "VideoTextModel",
    ),
    "zoo": ("list_models",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

_KERNELS_VERSION = "0.1.0"
_HERE = Path(__file__).resolve().parent
# A wheel carries `kernels` within the package (pyproject.toml); a checkout has it beside it.
_KERNELS = next(
    folder for folder in (_HERE / "bundled" / "kernels", _HERE.parent / "kernels") if (folder / "__init__.py").is_file()
)


class _OwnKernels:
    """Finds `kernels` where this umt_fast has it, also where umt-kernels is installed too, in whatever version."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        if name != "kernels":
            return None
        return spec_from_file_location(name, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)])


# Looked for, not imported: torch takes seconds, and the command line wants to be there before it (Ctrl-C, --help).
_found = find_spec("kernels")
# A folder without modules, of whatever purpose, has no origin and is in nobody's way.
if _found is not None and _found.origin is not None:
    if not Path(_found.origin).with_name("semantic_mask.py").is_file():
        raise ImportError(
            f"another package named `kernels` shadows umt_fast's own: {_found.origin}. "
            "Uninstall it (Hugging Face publishes one of that name) or put umt_fast's folder first on sys.path"
        )
    _version = getattr(sys.modules.get("kernels"), "__version__", _KERNELS_VERSION)
    if _version != _KERNELS_VERSION:
        raise ImportError(
            f"kernels {_version} ({_found.origin}) was imported before umt_fast, which needs {_KERNELS_VERSION}; "
            f"import umt_fast first, or install umt-kernels=={_KERNELS_VERSION}"
        )
sys.meta_path.insert(0, _OwnKernels)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'umt_fast' has no attribute {name!r}")
    value = getattr(import_module(f"umt_fast.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
