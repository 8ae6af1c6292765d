"""Products with their own epilogues: product.py the kernel, layers.py linear and mlp, norm.py what
a deferred LayerNorm needs, scaled.py the 8-bit form."""

from kernels.linear.layers import linear, mlp, weight_gradient
from kernels.linear.norm import DeferredNorm, defer_norm, row_statistics
from kernels.linear.scaled import scaled_linear

__all__ = ["DeferredNorm", "defer_norm", "linear", "mlp", "row_statistics", "scaled_linear", "weight_gradient"]
