"""layer_norm, linear and mlp as modules, with the parameter names of torch.nn and timm, so that their weights load.

Under autocast Linear and Mlp take x in autocast's dtype, as torch.nn.Linear does; fp32 weights are rounded inside and get fp32
gradients. LayerNorm computes in fp32 anyhow, and gives the dtype it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels._launch import Backend, autocasts
from kernels.layer_norm import layer_norm
from kernels.linear.layers import Activation, Save, linear, mlp
from kernels.linear.product import ACTIVATIONS


def _as_autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if x.dtype != torch.float64 and autocasts(kind) else x


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last axis, behind the sum of a residual stream and a branch where there is one.

    Args:
        normalized_shape: K, or (K,).
        eps: as of torch.nn.LayerNorm. It always has a weight and a bias, each (K,).
        out_dtype: of the norm; x's by default.
        backend: as of kernels.layer_norm.
        device, dtype: of the parameters.

    Raises:
        ValueError: more than one axis.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        out_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, device=device, dtype=dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape is {self.normalized_shape}; it must be one number, of the last axis")
        self.out_dtype, self.backend = out_dtype, backend

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        *,
        branch_scale: Tensor | None = None,
        with_stream: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, branch: (..., K); branch_scale, with_stream: as of kernels.layer_norm. Returns LayerNorm(x), (..., K); with a
        branch that of the sum, and the sum in x's dtype."""
        options = {"branch": branch, "branch_scale": branch_scale, "with_stream": with_stream}
        options |= {"dtype": self.out_dtype, "backend": self.backend}
        return layer_norm(x, self.weight, self.bias, self.eps, **options)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, out_dtype={self.out_dtype}"


class Linear(nn.Linear):
    """act(x @ weight.T + bias) + residual in one pass.

    Args:
        in_features, out_features, bias: K, N and whether there is a bias, as of torch.nn.Linear.
        activation: "none", "gelu" (exact) or "quick_gelu".
        backend: as of kernels.linear.
        device, dtype: of the parameters, which may be fp32 where x is not.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: Activation = "none",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        self.activation, self.backend = activation, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (..., K), residual: (..., N). Returns (..., N) in the residual's dtype, else x's."""
        options = {"activation": self.activation, "residual": residual, "backend": self.backend}
        return linear(_as_autocast(x), self.weight, self.bias, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class Mlp(nn.Module):
    """fc2(act(fc1(x))) + residual, whose backward multiplies by act' inside the product before it.

    fc1 and fc2 hold the parameters, under the names of timm's Mlp. They are not called, so their hooks do not run.

    Args:
        in_features: K. hidden_features: H, K by default. out_features: N, K by default.
        bias: whether both layers have one.
        activation: "gelu" (exact) or "quick_gelu".
        save: what backward keeps, as of kernels.mlp.
        backend: as of kernels.mlp.
        device, dtype: of the parameters, which may be fp32 where x is not.

    Raises:
        ValueError: an unknown activation or save.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        bias: bool = True,
        activation: Activation = "gelu",
        save: Save = "pre",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "quick_gelu") or save not in ("pre", "both"):
            raise ValueError(
                f"activation is {activation!r} and save {save!r}; choose gelu or quick_gelu, and pre or both"
            )
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden, bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias, device=device, dtype=dtype)
        self.activation, self.save, self.backend = activation, save, backend

    def forward(self, x: Tensor, residual: Tensor | None = None, *, branch_scale: Tensor | None = None) -> Tensor:
        """x: (..., K), residual: (..., N), branch_scale: as of kernels.mlp. Returns (..., N) in the residual's dtype, else
        x's."""
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        options = {"activation": self.activation, "save": self.save, "backend": self.backend}
        return mlp(_as_autocast(x), *weights, residual=residual, branch_scale=branch_scale, **options)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, save={self.save!r}"
