"""GPTQ: round one input column at a time and let the columns still to come make up for the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323. The objective is the squared error of the layer's outputs, tr((W - Q) H (W - Q)^T) with H the mean of
x x^T. Columns are taken in order of falling diag(H) ("activation order"), while groups stay those of adjacent columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmshrink.forms import Event, Layer
from llmshrink.methods.base import Method, Prepared, Task
from llmshrink.methods.grid import Grid, GridConfig, choose_grid, encode
from llmshrink.statistics import Hessian, Statistic

DOUBLE_WIDTH = 4096  # widest Hessian that is factorised in float64
LADDER = (1.0, 10.0, 100.0, 1000.0)  # factors on the damping, tried in turn


class GptqConfig(GridConfig):
    """Settings of GPTQ."""

    act_order: bool = Field(True, description="quantize the inputs with the largest mean square first")
    damp: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    block_size: int = Field(128, ge=1, description="columns between two updates of the whole matrix (speed only)")


@dataclass(frozen=True)
class Factors(Prepared):
    """The factorised Hessian of a group of linears; `update` is None where only rounding to nearest is possible."""

    matrix: Tensor | None = None  # float32 [in, in], as gathered
    importance: Tensor | None = None  # float32 [in], the damped diagonal
    order: Tensor | None = None  # int64 [in], the columns in the order they are rounded
    update: Tensor | None = None  # float32 [in, in] in that order, unit upper triangular: row i spreads error i


class Gptq(Method[GptqConfig]):
    """GPTQ with activation order, static groups and searched scales."""

    task: ClassVar[Task] = "quantize"
    needs = Hessian
    baseline = "rtn"
    Config = GptqConfig

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix [out, in] of this shape cannot be compressed, or None."""
        return self.config.why_not(shape)

    def prepare(self, statistic: Statistic) -> Factors:
        """Order the columns and factorise the Hessian once for all linears fed by the same tensor."""
        assert isinstance(statistic, Hessian)
        H = statistic.matrix
        if statistic.tokens == 0 or not H.isfinite().all():
            why = "no calibration token reached it" if statistic.tokens == 0 else "its Hessian is not finite"
            return Factors(events=(Event("rtn_fallback", f"rounded to nearest: {why}"),))
        diagonal = H.diagonal()
        dead = int((diagonal <= 0).sum())
        events: tuple[Event, ...] = ()
        if dead:
            message = f"{dead} of {H.shape[0]} inputs were always zero: their weights are rounded to nearest"
            events = (Event("dead_columns", message, data={"columns": float(dead)}),)
        order = diagonal.argsort(descending=True, stable=True) if self.config.act_order else torch.arange(H.shape[0])
        mean = diagonal.sum() / max(H.shape[0] - dead, 1)
        for factor in LADDER:
            damp = float(self.config.damp * factor * mean) or 1.0
            update = _factorise(H, order, damp)
            if update is not None:
                if factor > 1:
                    message = f"damping raised to {self.config.damp * factor:g} of the mean diagonal"
                    events += (Event("damping", message, data={"damp": self.config.damp * factor}),)
                return Factors(events, H, diagonal + damp, order, update)
        failed = Event("rtn_fallback", "rounded to nearest: the Hessian could not be factorised at any damping")
        return Factors((*events, failed))

    def compress(self, weight: Tensor, prepared: Prepared) -> Layer:
        """Quantize one matrix [out, in]; scales are stored in its dtype."""
        assert isinstance(prepared, Factors)
        matrix = weight.float()
        grid = choose_grid(matrix, self.config, weight.dtype)
        codes = encode(matrix, grid, self.config)
        if prepared.update is not None:
            grid, codes = self._better(matrix, grid, codes, weight.dtype, prepared)
        return Layer(grid.form(codes, self.config))

    def _better(
        self, matrix: Tensor, grid: Grid, codes: Tensor, dtype: torch.dtype, factors: Factors
    ) -> tuple[Grid, Tensor]:
        """Each row by GPTQ, or as rounded to nearest where that is nearer in the objective."""
        assert factors.matrix is not None
        group = self.config.group(matrix.shape[1])
        own = choose_grid(matrix, self.config, dtype, factors.importance)
        own_codes = self._sweep(matrix, own, factors)
        keep = _objective(matrix - _mean(codes, grid, group), factors.matrix) < _objective(
            matrix - _mean(own_codes, own, group), factors.matrix
        )
        zero = None if own.zero is None or grid.zero is None else torch.where(keep[:, None], grid.zero, own.zero)
        scale = torch.where(keep[:, None], grid.scale, own.scale)
        return Grid(scale, zero), torch.where(keep[:, None], codes, own_codes)

    def _sweep(self, matrix: Tensor, grid: Grid, factors: Factors) -> Tensor:
        """Codes int8 [out, in] by the paper's algorithm 1, on a transposed copy so that a column is contiguous."""
        assert factors.update is not None and factors.order is not None
        group = self.config.group(matrix.shape[1])
        low, high = self.config.code_range
        order, size = factors.order, self.config.block_size
        W = matrix.T[order].contiguous()
        scale, zero = grid.columns(group)
        S = scale.T[order].contiguous()
        Z = torch.zeros(1, 1).expand(len(order), 1) if zero is None else zero.T[order].contiguous()
        codes = torch.empty_like(W)
        for start in range(0, len(order), size):
            stop = min(start + size, len(order))
            block, rows = W[start:stop], factors.update[start:stop, start:stop]
            errors = torch.empty_like(block)
            for i in range(stop - start):
                w, s, z = block[i], S[start + i], Z[start + i]
                code = (w / s + z).round_().clamp_(low, high)
                codes[start + i] = code
                torch.sub(w, (code - z) * s, out=errors[i])
                block[i + 1 :].addr_(rows[i, i + 1 :], errors[i], alpha=-1)
            W[stop:].addmm_(factors.update[start:stop, stop:].T, errors, alpha=-1)
        result = torch.empty_like(codes)
        result[order] = codes
        return result.T.contiguous().to(torch.int8)

    def form(self, shape: tuple[int, int], dtype: torch.dtype) -> Layer:
        """The same structure on the `meta` device."""
        return self.config.meta(shape, dtype)


def _factorise(H: Tensor, order: Tensor, damp: float) -> Tensor | None:
    """D^-1 U for the upper Cholesky factor U of (H + damp)^-1 in the given order, or None where H is too singular.

    With the order reversed, H = R R^T for an upper R by an ordinary Cholesky, and then U = R^-1: no explicit inverse.
    """
    kind = torch.float64 if H.shape[0] <= DOUBLE_WIDTH else torch.float32
    back = order.flip(0)
    reverse = H[back][:, back].to(kind)
    reverse.diagonal().add_(damp)
    L, info = torch.linalg.cholesky_ex(reverse)
    if info.item() or not L.isfinite().all():
        return None
    R = L.flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(len(order), dtype=kind, device=H.device), upper=True)
    U /= U.diagonal()[:, None].clone()
    return U.float() if U.isfinite().all() else None


def _mean(codes: Tensor, grid: Grid, group: int) -> Tensor:
    """What int8 codes [out, in] mean: float32."""
    scale, zero = grid.columns(group)
    return (codes.float() if zero is None else codes.float() - zero) * scale


def _objective(rest: Tensor, H: Tensor) -> Tensor:
    """Mean squared output error [out] of each row of `rest` [out, in]."""
    return ((rest @ H) * rest).sum(1)


METHOD = Gptq
