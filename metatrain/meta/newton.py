"""Logistic regressions of many tasks at once, by damped Newton steps through which gradients flow.

Of each task it minimises over u

    Σₛ mₛ [softplus(fₛ) − yₛ fₛ] + ½ uᵀ M u,        f = offset + D u

in one of two forms, which reach the same f: `weights` (D = X, M = I: unknowns are the K weights) and `duals`
(D = M = G = X Xᵀ or any kernel's matrix: unknowns are S coefficients a, and weights are Xᵀ a). Each step is iteratively
reweighted least squares: with R = W^½, W = p (1 − p), the first solves (XᵀR²X + I) d = −gradient, the second
I + R G R by Woodbury's identity, in the form that never divides by W (Rasmussen and Williams 2006, "Gaussian Processes
for Machine Learning", algorithm 3.1).

Undamped steps go to and fro for ever where an offset is large and wrong (W is then near 0 and the step far too long).
So a step is halved until the objective falls by Armijo's rule. Which halving is taken is a constant to the gradient, as
it is almost everywhere; close to the optimum steps are whole, and convergence is quadratic.

Symbols: T tasks, S support events, K weights, N unknowns (K or S), C lengths of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from metatrain.meta.solve import solve

_HALVINGS = 8
# Armijo's constant: the share of the decrease that the slope promises which a step must bring.
_SUFFICIENT = 1e-4


def weights(x: Tensor, labels: Tensor, mask: Tensor, offset: Tensor, steps: int) -> Tensor:
    """The regression's weights, solved in the smaller of S and K: [T, S, K], then [T, S] each → [T, K].

    Args:
        x: Regressors; their λ is 1, so others are divided by the root of theirs.
        labels: 0 or 1, or a share between.
        mask: 1 for an event, 0 for padding.
        offset: Logits that the regression adds to.
        steps: Newton steps; 0 leaves the weights at 0.
    """
    x = x * mask.unsqueeze(-1)
    _, events, width = x.shape
    if events <= width:
        return _times(x.mT, duals(x @ x.mT, labels, mask, offset, steps))
    unit = torch.eye(width, dtype=x.dtype, device=x.device)
    w_TK, f_TS = x.new_zeros(x.shape[0], width), offset
    for _ in range(steps):
        residual_TS, root_TS = _curvature(f_TS, labels, mask)
        scaled_TSK = root_TS.unsqueeze(-1) * x
        d_TK = solve(scaled_TSK.mT @ scaled_TSK + unit, _times(x.mT, residual_TS) - w_TK)
        df_TS = _times(x, d_TK)
        t_T1 = _length(f_TS, df_TS, labels, mask, residual_TS, _penalty(w_TK, w_TK, d_TK, d_TK))
        w_TK, f_TS = w_TK + t_T1 * d_TK, f_TS + t_T1 * df_TS
    return w_TK


def duals(gram: Tensor, labels: Tensor, mask: Tensor, offset: Tensor, steps: int) -> Tensor:
    """The coefficients a of the support events, f = offset + G a: [T, S, S], then [T, S] each → [T, S].

    Args:
        gram: G, with zeros in the rows and columns of padding.
        labels, mask, offset, steps: See `weights`.
    """
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    a_TS, f_TS = torch.zeros_like(offset), offset
    for _ in range(steps):
        residual_TS, root_TS = _curvature(f_TS, labels, mask)
        downhill_TS = residual_TS - a_TS
        system = root_TS.unsqueeze(-1) * gram * root_TS.unsqueeze(-2) + unit
        d_TS = downhill_TS - root_TS * solve(system, root_TS * _times(gram, downhill_TS))
        df_TS = _times(gram, d_TS)
        t_T1 = _length(f_TS, df_TS, labels, mask, residual_TS, _penalty(a_TS, f_TS - offset, d_TS, df_TS))
        a_TS, f_TS = a_TS + t_T1 * d_TS, f_TS + t_T1 * df_TS
    return a_TS


def _curvature(f: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """y − p and W^½, both 0 for padding."""
    # The root of p (1 − p) itself has an infinite slope where p is rounded to 0 or 1.
    return (labels - torch.sigmoid(f)) * mask, torch.exp(0.5 * (logsigmoid(f) + logsigmoid(-f))) * mask


@torch.no_grad()
def _penalty(u: Tensor, mu: Tensor, d: Tensor, md: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and half the curvature [T] of ½ (u + t d)ᵀ M (u + t d) in t."""
    return (mu * d).sum(-1), 0.5 * (d * md).sum(-1)


@torch.no_grad()
def _length(
    f: Tensor, df: Tensor, labels: Tensor, mask: Tensor, residual: Tensor, penalty: tuple[Tensor, Tensor]
) -> Tensor:
    """The first of 1, ½, ¼, … that lowers a task's objective enough, else the last: [T, 1], a constant."""
    t_C1 = 0.5 ** torch.arange(_HALVINGS, dtype=f.dtype, device=f.device).unsqueeze(-1)
    at_CTS = f + t_C1.unsqueeze(-1) * df
    before_TS = softplus(f) - labels * f
    change_CT = ((softplus(at_CTS) - labels * at_CTS - before_TS) * mask).sum(-1)
    change_CT = change_CT + t_C1 * penalty[0] + t_C1.square() * penalty[1]
    slope_T = penalty[0] - (residual * df).sum(-1)
    # At the optimum the change is of the size of rounding, and a whole step is right.
    rounding_T = 8 * torch.finfo(f.dtype).eps * (1 + (before_TS * mask).sum(-1))
    enough_CT = change_CT <= _SUFFICIENT * t_C1 * slope_T + rounding_T
    halvings_T = (~enough_CT).long().cumprod(0).sum(0).clamp(max=_HALVINGS - 1)
    return t_C1[halvings_T]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
