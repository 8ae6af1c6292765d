"""Training of Unmasked Teacher video foundation models."""

import kernels

__version__ = "0.1.0"

if not hasattr(kernels, "semantic_mask"):
    raise ImportError(
        f"another package named `kernels` shadows umt_fast's own: {kernels.__file__}. "
        "Uninstall it (Hugging Face publishes one of that name) or put umt_fast's folder first on sys.path"
    )
