"""Operations of masked video pre-training, each a plain PyTorch reference and a Triton kernel behind one function.

Tensors in, tensors out: this package needs torch and triton alone. The device of a tensor decides the backend; see each
function's docstring for shapes, formula and bytes moved.
"""

from kernels import flops  # noqa: F401  what torch.utils.flop_counter asks
from kernels._launch import checked, force_backend
from kernels.align_loss import align_features, align_loss
from kernels.attention import AttentionBackend, attention, attention_backend, attention_varlen, require_attention
from kernels.layer_norm import layer_norm
from kernels.library import frozen_linear, library_linear, library_product
from kernels.linear import DeferredNorm, defer_norm, linear, mlp, row_statistics, scaled_linear, weight_gradient
from kernels.linear.tiles import use_tiles
from kernels.modules import LayerNorm, Linear, Mlp
from kernels.patch_gather import FoldedPixels, fold_pixels, patch_gather
from kernels.qkv_attention import attention_qkv
from kernels.quantize import dequantize_product, norm_quantize, quantize_rows
from kernels.quantized_linear import (
    Norm,
    Quantized,
    quantize_weight,
    quantized_backend,
    quantized_linear,
    quantized_mlp,
)
from kernels.semantic_mask import class_attention, sample_visible, semantic_mask
from kernels.token_gather import gather_norm, token_gather

__version__ = "0.1.0"

__all__ = [
    "AttentionBackend",
    "DeferredNorm",
    "FoldedPixels",
    "LayerNorm",
    "Linear",
    "Mlp",
    "Norm",
    "Quantized",
    "align_features",
    "align_loss",
    "attention",
    "attention_backend",
    "attention_qkv",
    "attention_varlen",
    "checked",
    "class_attention",
    "defer_norm",
    "dequantize_product",
    "fold_pixels",
    "force_backend",
    "frozen_linear",
    "gather_norm",
    "layer_norm",
    "library_linear",
    "library_product",
    "linear",
    "mlp",
    "norm_quantize",
    "patch_gather",
    "quantize_rows",
    "quantize_weight",
    "quantized_linear",
    "quantized_backend",
    "quantized_mlp",
    "require_attention",
    "row_statistics",
    "sample_visible",
    "scaled_linear",
    "semantic_mask",
    "token_gather",
    "use_tiles",
    "weight_gradient",
]
