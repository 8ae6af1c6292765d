"""The teacher's blocks in 8 bits, and their linear layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

import kernels
from umt_fast.config import ConfigError, TeacherConfig, TeacherPrecision
from umt_fast.models.attention import Attends
from umt_fast.models.linear import Multiplies
from umt_fast.models.teachers.base import teacher_kind

# Channels of a hidden layer in 8 bits that share a scale where products are fused.
_SCALE_BLOCK = 128


class QuantizedLinear(nn.Module):
    """The weights of a Linear in 8 bits; its inputs are quantized row by row."""

    backend: Literal["auto", "reference"] = "auto"
    """`reference` computes by the definition, slowly: to see what a precision changes where no device has it."""

    def __init__(self, weight: Tensor, bias: Tensor, precision: TeacherPrecision) -> None:
        """weight (N, K) and bias (N,) fp32; precision int8 or fp8."""
        super().__init__()
        self.precision = precision
        values, scale = kernels.quantize_weight(weight.detach(), precision)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias.detach().float())

    @property
    def parts(self) -> kernels.Quantized:
        return kernels.Quantized(self.weight, self.scale, self.bias)

    def fused(self, values: Tensor, scales: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Of an input that is in 8 bits already, (M, K): kernels.scaled_linear, with its options."""
        return kernels.scaled_linear(values, scales, self.weight, self.scale, self.bias, backend="triton", **options)

    def after_norm(self, x: Tensor, norm: nn.LayerNorm, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """fused of norm(x), x (M, K); the LayerNorm itself writes 8 bits."""
        options_of_norm = {"eps": norm.eps, "backend": "triton"}
        eight = kernels.norm_quantize(x, norm.weight, norm.bias, self.precision, **options_of_norm)
        return self.fused(*eight, **options)


def _norm(norm: nn.LayerNorm) -> kernels.Norm:
    return kernels.Norm(norm.weight, norm.bias, norm.eps)


class QuantizedBlock(Attends, Multiplies):
    """Takes the place of a pre-norm block that is always computed whole: 11 of 12 parts of its products in 8 bits.

    Attention and the projection behind it stay as they were: that product is the smallest, and its input costs a quantizer of
    its own.
    """

    def __init__(self, block: nn.Module, precision: TeacherPrecision) -> None:
        """block: a Block of frame_tower.py, whose parts this one takes."""
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.num_heads, self.activation = attn.num_heads, mlp.activation
        self.ln_1, self.ln_2, self.out_proj = block.ln_1, block.ln_2, attn.out_proj
        self.in_proj = QuantizedLinear(attn.in_proj_weight, attn.in_proj_bias, precision)
        self.c_fc = QuantizedLinear(mlp.c_fc.weight, mlp.c_fc.bias, precision)
        self.c_proj = QuantizedLinear(mlp.c_proj.weight, mlp.c_proj.bias, precision)

    def fuse(self, dtype: torch.dtype) -> None:
        """Computes by kernels.scaled_linear from now on. Raises ConfigError for a hidden layer without whole scales."""
        hidden = len(self.c_fc.weight)
        if hidden % _SCALE_BLOCK:
            raise ConfigError(
                f"run.linear is 'fused', but {hidden} hidden channels of an 8-bit teacher are not a multiple of "
                f"{_SCALE_BLOCK}, which share a scale; use --run.linear library"
            )
        super().fuse(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(R, 1 + L, C) -> the same."""
        rows = x.flatten(0, -2)
        if self.linear_backend == "fused":
            qkv = self.in_proj.after_norm(rows, self.ln_1, dtype=x.dtype).view(*x.shape[:-1], -1)
        else:
            backend = self.in_proj.backend
            qkv = kernels.quantized_linear(x, *self.in_proj.parts, norm=_norm(self.ln_1), backend=backend)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        heads = kernels.attention(q, k, v, prefer=self.attention_backend).flatten(2)
        out = self.out_proj
        if self.linear_backend == "fused":
            rows = kernels.linear(heads.flatten(0, -2), out.weight, out.bias, residual=rows, backend="triton")
            options = {"activation": self.activation, "dtype": self.c_fc.weight.dtype}
            hidden = self.c_fc.after_norm(rows, self.ln_2, **options)
            return self.c_proj.fused(*hidden, residual=rows, dtype=x.dtype).view(x.shape)
        x = x + kernels.frozen_linear(heads, out.weight, out.bias)
        layers = self.c_fc.parts, self.c_proj.parts
        return kernels.quantized_mlp(
            x, _norm(self.ln_2), *layers, activation=self.activation, backend=self.c_fc.backend
        )


def require_precision(teacher: TeacherConfig, device: torch.device) -> None:
    """Raises ConfigError where the device cannot compute in teacher.precision, or teacher.kind has no such form."""
    teacher_kind(teacher)
    if teacher.precision != "native":
        try:
            kernels.quantized_backend(teacher.precision, device)
        except ValueError as error:
            raise ConfigError(f"teacher.precision is {teacher.precision!r}: {error}") from error
