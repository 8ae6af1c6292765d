"""The matrix product of kernels.linear: one persistent Triton kernel, its epilogues, and the tiles it runs with.

    value[m, n] = sum_k A[m, k] * B[n, k],  then the epilogue, while the tile is in registers

A and B are stored as (M, K) and (N, K), or transposed where A_T and B_T say so. One program per SM walks over the output's
tiles in groups of GROUP rows of tiles, so that the tiles in flight share their operands in the L2 cache. Operands come by
TMA on compute capability 9.0 and above where their memory is aligned to 16 bytes, else by pointers (cp.async on 8.0).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._launch import COMPILER_OPTIONS, interpreted, on_device
from kernels.linear import tiles as choice
from kernels.quantize import LARGEST, TINY

ACTIVATIONS = {"none": 0, "gelu": 1, "quick_gelu": 2}
# Columns that share a scale in 8-bit results of a product, and so the depth of a step of the product that reads them.
SCALE_BLOCK = 128
# Rows of tiles whose tiles are neighbors in time.
GROUP = 8


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """1: exact GELU, x * Phi(x). 2: QuickGELU, x * sigmoid(1.702 x)."""
    if KIND == 1:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if KIND == 2:
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def _activation_slope(x, KIND: tl.constexpr):
    """The derivative of _activation: Phi(x) + x * phi(x), or s + 1.702 x s (1 - s)."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if KIND == 1:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    if KIND == 2:
        s = tl.sigmoid(1.702 * x)
        slope = s + 1.702 * x * s * (1 - s)
    return slope


@triton.jit
def _tile(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
):
    """(HEIGHT, WIDTH) of a row-major matrix from (row, column) on; zeros outside."""
    if TMA:
        tile = source.load([row, column])
    else:
        i, j = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        place = source + i.to(tl.int64)[:, None] * stride + j[None, :]
        if EVEN_ROWS:
            tile = tl.load(place, mask=(j < columns)[None, :], other=0.0)
        elif EVEN_COLUMNS:
            tile = tl.load(place, mask=(i < rows)[:, None], other=0.0)
        else:
            tile = tl.load(place, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def _store_quantized(
    out,
    out_scale,
    value,
    m,
    n,
    inside,
    first,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):
    """value in 8 bits with a scale for each row and 128 columns, by the rule of quantize.py."""
    BLOCKS: tl.constexpr = BLOCK_N // 128
    parts = tl.reshape(value, (BLOCK_M, BLOCKS, 128))
    # As in quantize.py: without their signs the bits are ordered as the numbers, and NaN counts.
    bits = parts.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 2).to(tl.float32, bitcast=True)
    block = first // 128 + tl.arange(0, BLOCKS)
    place = out_scale + m.to(tl.int64)[:, None] * (N // 128) + block[None, :]
    tl.store(place, tl.div_rn(largest, LARGEST), mask=(m < M)[:, None] & (block < N // 128)[None, :])
    factor = tl.div_rn(1.0, tl.maximum(largest, TINY)) * LARGEST
    scaled = tl.reshape(parts * factor[:, :, None], (BLOCK_M, BLOCK_N))
    if out.dtype.element_ty == tl.int8:
        rounded = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = scaled.to(out.dtype.element_ty)
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], rounded, mask=inside)


@triton.jit
def _epilogue(
    acc, row, col, i_m, split,
    out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
    M, N, residual_row,
    KIND: tl.constexpr, BACKWARD: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_SCALES: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the sums of the tile at (row, col) to what is stored; see product_kernel."""
    m, n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    value = acc.to(tl.float32)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    if b_scale is not None:
        if not BLOCK_SCALES:
            value *= tl.load(a_scale + m, mask=m < M, other=0)[:, None]
        value *= tl.load(b_scale + n, mask=n < N, other=0)[None, :]
    if column is not None:
        shift = tl.load(mean + m, mask=m < M, other=0)[:, None] * tl.load(column + n, mask=n < N, other=0)[None, :]
        value = tl.load(rstd + m, mask=m < M, other=0)[:, None] * (value - shift)
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if BACKWARD:
        before = tl.load(pre + place, mask=inside, other=0).to(tl.float32)
        value *= _activation_slope(before, KIND)
        if hidden is not None:
            tl.store(hidden + place, _activation(before, KIND).to(hidden.dtype.element_ty), mask=inside)
        if sums is not None:
            tl.store(sums + i_m.to(tl.int64) * N + n, tl.sum(value, 0), mask=n < N)
    else:
        if pre is not None:
            tl.store(pre + place, value.to(pre.dtype.element_ty), mask=inside)
        value = _activation(value, KIND)
    if row_scale is not None:
        value *= tl.load(row_scale + m, mask=m < M, other=0)[:, None]
    if residual is not None:
        value += tl.load(residual + m.to(tl.int64)[:, None] * residual_row + n[None, :], mask=inside, other=0).to(
            tl.float32
        )
    if out_scale is not None:
        value = tl.where(inside, value, 0.0)
        _store_quantized(out, out_scale, value, m, n, inside, col, M, N, BLOCK_M, BLOCK_N, LARGEST, TINY)
    else:
        place += split.to(tl.int64) * M * N
        if ACCUMULATE:
            value += tl.load(out + place, mask=inside, other=0).to(tl.float32)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _epilogue_in_parts(
    acc, row, col, i_m, split,
    out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
    M, N, residual_row,
    KIND: tl.constexpr, BACKWARD: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_SCALES: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """_epilogue, part after part of the columns: beside the sums, registers then hold a part of its numbers alone."""
    if PARTS == 1:
        _epilogue(
            acc, row, col, i_m, split,
            out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
            M, N, residual_row,
            KIND, BACKWARD, ACCUMULATE, BLOCK_SCALES, LARGEST, TINY, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        _epilogue(
            left, row, col, i_m, split,
            out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
            M, N, residual_row,
            KIND, BACKWARD, ACCUMULATE, BLOCK_SCALES, LARGEST, TINY, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _epilogue(
            right, row, col + BLOCK_N // 2, i_m, split,
            out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
            M, N, residual_row,
            KIND, BACKWARD, ACCUMULATE, BLOCK_SCALES, LARGEST, TINY, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def product_kernel(
    out, out_scale, pre, hidden, sums, a, b, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
    M, N, K, a_row, b_row, residual_row,
    A_T: tl.constexpr, B_T: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, KIND: tl.constexpr,
    BACKWARD: tl.constexpr, SPLITS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    INTEGER: tl.constexpr, UPCAST: tl.constexpr, BLOCK_SCALES: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = epilogue(A @ B.T); operands that are None are left out of it.

    Forward: * a_scale[m] * b_scale[n]; rstd[m] * (value - mean[m] * column[n]); + bias[n]; pre = value; activation;
    * row_scale[m]; + residual. BACKWARD: * activation'(pre), which is read; hidden = activation(pre); sums = its sums over a
    tile's rows.
    SPLITS > 1: each split of K writes its own (M, N) of out.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    of_split = tl.cdiv(steps, SPLITS)
    in_group = GROUP * tiles_n
    for number in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0)):
        split, i_tile = number // (tiles_m * tiles_n), number % (tiles_m * tiles_n)
        first_m = i_tile // in_group * GROUP
        high = tl.minimum(tiles_m - first_m, GROUP)
        i_m = first_m + i_tile % in_group % high
        i_n = i_tile % in_group // high
        row, col = i_m * BLOCK_M, i_n * BLOCK_N
        m = row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER and not BLOCK_SCALES else tl.float32)
        for step in tl.range(split * of_split, tl.minimum(steps, (split + 1) * of_split)):
            k = step * BLOCK_K
            if A_T:
                left = _tile(a, k, row, K, M, a_row, BLOCK_K, BLOCK_M, TMA, EVEN_K, False).T
            else:
                left = _tile(a, row, k, M, K, a_row, BLOCK_M, BLOCK_K, TMA, False, EVEN_K)
            if B_T:
                right = _tile(b, k, col, K, N, b_row, BLOCK_K, BLOCK_N, TMA, EVEN_K, False)
            else:
                right = _tile(b, col, k, N, K, b_row, BLOCK_N, BLOCK_K, TMA, False, EVEN_K).T
            if UPCAST:
                # The interpreter multiplies the bits of bf16 and fp8.
                left, right = left.to(tl.float32), right.to(tl.float32)
            if BLOCK_SCALES:
                part = tl.dot(left, right, out_dtype=tl.int32 if INTEGER else tl.float32)
                scale = tl.load(a_scale + m.to(tl.int64) * steps + step, mask=m < M, other=0)
                acc += part.to(tl.float32) * scale[:, None]
            elif INTEGER:
                acc = tl.dot(left, right, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if PARTS == 4:
            left, right = _halves(acc, BLOCK_M, BLOCK_N)
            _epilogue_in_parts(
                left, row, col, i_m, split,
                out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
                M, N, residual_row,
                KIND, BACKWARD, ACCUMULATE, BLOCK_SCALES, LARGEST, TINY, BLOCK_M, BLOCK_N // 2, 2,
            )  # fmt: skip
            _epilogue_in_parts(
                right, row, col + BLOCK_N // 2, i_m, split,
                out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
                M, N, residual_row,
                KIND, BACKWARD, ACCUMULATE, BLOCK_SCALES, LARGEST, TINY, BLOCK_M, BLOCK_N // 2, 2,
            )  # fmt: skip
        else:
            _epilogue_in_parts(
                acc, row, col, i_m, split,
                out, out_scale, pre, hidden, sums, a_scale, b_scale, mean, rstd, column, bias, row_scale, residual,
                M, N, residual_row,
                KIND, BACKWARD, ACCUMULATE, BLOCK_SCALES, LARGEST, TINY, BLOCK_M, BLOCK_N, PARTS,
            )  # fmt: skip


def _aligned(matrix: Tensor) -> bool:
    """Whether TMA can read it: 16 bytes at its start and between rows."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def use_tma(a: Tensor, b: Tensor) -> bool:
    """Whether operands come by TMA."""
    return a.is_cuda and choice.limits(a.device)[0] >= 90 and _aligned(a) and _aligned(b)


def rows_apart(matrix: Tensor) -> Tensor:
    """The matrix with numbers of a row side by side: itself, or else a copy. Rows may lie any distance apart."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 and matrix.is_contiguous() else matrix.contiguous()


def product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    a_t: bool = False,
    b_t: bool = False,
    kind: int = 0,
    backward: bool = False,
    splits: int = 1,
    accumulate: bool = False,
    tiles: dict[str, int] | None = None,
    **operands: Tensor | None,
) -> None:
    """Launches product_kernel into `out`, contiguous (M, N), or (splits, M, N). Other operands by the kernel's names."""
    M, N = out.shape[-2:]
    K = a.shape[0] if a_t else a.shape[1]
    if out.numel() == 0:
        return
    a, b, residual = rows_apart(a), rows_apart(b), operands.get("residual")
    operands["residual"] = residual = None if residual is None else rows_apart(residual)
    form = choice.form_of(out, a, operands, backward, a_t=a_t, b_t=b_t)
    if choice.recorded is not None:
        given = {"a_t": a_t, "b_t": b_t, "kind": kind, "backward": backward, "splits": splits, "accumulate": accumulate}
        choice.recorded.setdefault(form, (out, a, b, given | operands))
    tiles = dict(tiles or choice.tiles_of(form, a.device))
    tma = K > 0 and use_tma(a, b)
    shape_a = [tiles["BLOCK_K"], tiles["BLOCK_M"]] if a_t else [tiles["BLOCK_M"], tiles["BLOCK_K"]]
    shape_b = [tiles["BLOCK_K"], tiles["BLOCK_N"]] if b_t else [tiles["BLOCK_N"], tiles["BLOCK_K"]]
    left = TensorDescriptor.from_tensor(a, shape_a) if tma else a
    right = TensorDescriptor.from_tensor(b, shape_b) if tma else b
    count = triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(N, tiles["BLOCK_N"]) * splits
    with on_device(out):
        product_kernel[(min(count, choice.limits(a.device)[1]),)](
            out,
            operands.get("out_scale"),
            operands.get("pre"),
            operands.get("hidden"),
            operands.get("sums"),
            left,
            right,
            *(operands.get(name) for name in ("a_scale", "b_scale", "mean", "rstd", "column", "bias", "row_scale")),
            residual,
            M,
            N,
            K,
            a.stride(0),
            b.stride(0),
            0 if residual is None else residual.stride(0),
            A_T=a_t,
            B_T=b_t,
            TMA=tma,
            EVEN_K=K % tiles["BLOCK_K"] == 0,
            KIND=kind,
            BACKWARD=backward,
            SPLITS=splits,
            ACCUMULATE=accumulate,
            **constants(out, a, operands.get("a_scale")),
            **tiles,
            **COMPILER_OPTIONS,
        )


def constants(out: Tensor, a: Tensor, a_scale: Tensor | None) -> dict[str, Any]:
    """What the dtypes alone decide."""
    # PyTorch's own switch for fp32 products.
    tf32 = a.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "INTEGER": a.dtype == torch.int8,
        "UPCAST": interpreted() and a.dtype in (torch.bfloat16, torch.float8_e4m3fn),
        "BLOCK_SCALES": a_scale is not None and a_scale.ndim == 2 and a_scale.shape[1] > 1,
        "LARGEST": LARGEST.get(out.dtype, 0.0),
        "TINY": TINY,
        "GROUP": GROUP,
    }
