"""A frozen linear layer in 8 bits, for the teacher."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import kernels
from umt_fast.config import ConfigError, TeacherConfig, TeacherPrecision
from umt_fast.models.teachers.base import teacher_kind


class QuantizedLinear(nn.Module):
    """Takes the place of a Linear: 8-bit weights, activations quantized row by row (kernels.quantized_linear)."""

    backend: Literal["auto", "reference"] = "auto"
    """`reference` computes by the definition, slowly: to see what a precision changes where no device has it."""

    def __init__(self, weight: Tensor, bias: Tensor, precision: TeacherPrecision) -> None:
        """weight (N, K) and bias (N,) fp32; precision int8 or fp8."""
        super().__init__()
        values, scale = kernels.quantize_weight(weight.detach(), precision)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias.detach().float())

    def forward(self, x: Tensor, factor: float = 1.0, bias_factor: float = 1.0) -> Tensor:
        """(..., K) -> (..., N); factor multiplies the product, bias_factor the bias: no pass over the result."""
        scale = self.scale if factor == 1 else self.scale * factor
        bias = self.bias if bias_factor == 1 else self.bias * bias_factor
        return kernels.quantized_linear(x, self.weight, scale, bias, backend=self.backend)


def require_precision(teacher: TeacherConfig, device: torch.device) -> None:
    """Raises ConfigError where the device cannot compute in teacher.precision, or teacher.kind has no such form."""
    teacher_kind(teacher)
    if teacher.precision != "native":
        try:
            kernels.quantized_backend(teacher.precision, device)
        except ValueError as error:
            raise ConfigError(f"teacher.precision is {teacher.precision!r}: {error}") from error
