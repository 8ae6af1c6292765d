"""Training of Unmasked Teacher video foundation models."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

# Looked for, not imported: torch takes seconds, and the command line wants to be there before it (Ctrl-C, --help).
_found = find_spec("kernels")
if _found is not None and not any(
    Path(folder, "semantic_mask.py").is_file() for folder in _found.submodule_search_locations or ()
):
    raise ImportError(
        f"another package named `kernels` shadows umt_fast's own: {_found.origin}. "
        "Uninstall it (Hugging Face publishes one of that name) or put umt_fast's folder first on sys.path"
    )
