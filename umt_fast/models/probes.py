"""Heads that are trained on the features of a frozen tower, many at once: every parameter has the heads as first dimension.

Legend: H heads, B clips, n tokens of a clip, C width, K classes, A attention heads, d channels of one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearProbes(nn.Module):
    """H linear layers without a norm; all of them begin at zero."""

    def __init__(self, heads: int, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, classes, width))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def forward(self, pooled: Tensor) -> Tensor:
        """fp32 (B, C) -> logits (H, B, K)."""
        return torch.einsum("bc,hkc->hbk", pooled, self.weight) + self.bias[:, None]


class AttentiveProbes(nn.Module):
    """H attentive probes: a learned query looks at all tokens of a clip by one cross-attention block, then a linear layer.

    The block of V-JEPA (arXiv 2404.08471): query + attention(query, norm(tokens)), then + mlp(norm(.)) with GELU
    and 4 C hidden channels. All heads begin alike. A bias of the keys would change no output, so there is none.

    The query is the same for every clip, so keys and values of tokens are never made. The key matrix is applied to the query,
    and the value matrix to the tokens' weighted mean: A products for a token in place of 2 C.
    """

    def __init__(self, heads: int, width: int, classes: int, attention_heads: int, generator: torch.Generator) -> None:
        """generator: of the CPU, for the weights, normal with deviation 0.02 cut at 0.04; biases begin at zero.

        attention_heads must divide width.
        """
        super().__init__()
        self.attention_heads = attention_heads

        def matrix(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
            value = torch.empty(rows, columns)
            nn.init.trunc_normal_(value, std=0.02, a=-0.04, b=0.04, generator=generator)
            return nn.Parameter((value * scale).repeat(heads, 1, 1))

        def vector(length: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full((heads, length), value))

        self.query = nn.Parameter(matrix(1, width).detach().squeeze(1))
        self.norm_weight, self.norm_bias = vector(width, 1.0), vector(width)
        self.query_weight, self.query_bias = matrix(width, width), vector(width)
        self.key_weight = matrix(width, width)
        self.value_weight, self.value_bias = matrix(width, width), vector(width)
        # The two layers that write to the residual begin smaller, as V-JEPA's do.
        self.out_weight, self.out_bias = matrix(width, width, 0.5**0.5), vector(width)
        self.mlp_norm_weight, self.mlp_norm_bias = vector(width, 1.0), vector(width)
        self.hidden_weight, self.hidden_bias = matrix(4 * width, width), vector(4 * width)
        self.mlp_weight, self.mlp_bias = matrix(width, 4 * width, 0.5**0.5), vector(width)
        self.weight, self.bias = matrix(classes, width), vector(classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, C) of any floating dtype -> logits (H, B, K) in the dtype of the weights."""
        found = self.query + self._attended(tokens.to(self.query.dtype))  # (B, H, C)
        normed = F.layer_norm(found, found.shape[-1:]) * self.mlp_norm_weight + self.mlp_norm_bias
        hidden = F.gelu(_each(normed, self.hidden_weight, self.hidden_bias))
        found = found + _each(hidden, self.mlp_weight, self.mlp_bias)
        return _each(found, self.weight, self.bias).transpose(0, 1)

    def _attended(self, tokens: Tensor) -> Tensor:
        """What the queries see, (B, H, C)."""
        normed = F.layer_norm(
            tokens, tokens.shape[-1:]
        )  # the norm's own weight and bias differ by head, and come later
        split = (self.attention_heads, -1)
        query = (torch.einsum("hc,hec->he", self.query, self.query_weight) + self.query_bias).unflatten(1, split)
        key = torch.einsum("had,hadc->hac", query / math.sqrt(query.shape[-1]), self.key_weight.unflatten(1, split))
        key = key * self.norm_weight[:, None]  # norm_bias adds the same to all scores of a query, which softmax undoes
        shares = (normed @ key.flatten(0, 1).t()).softmax(1)  # (B, n, H * A)
        mean = (shares.transpose(1, 2) @ normed).unflatten(1, key.shape[:2])  # (B, H, A, C)
        mean = mean * self.norm_weight[:, None] + self.norm_bias[:, None]
        value = (
            torch.einsum("bhac,hadc->bhad", mean, self.value_weight.unflatten(1, split)).flatten(2) + self.value_bias
        )
        return _each(value, self.out_weight, self.out_bias)


def _each(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, C) by each head's own layer (H, E, C) -> (B, H, E)."""
    return torch.einsum("bhc,hec->bhe", x, weight) + bias
