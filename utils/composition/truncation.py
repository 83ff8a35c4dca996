"""The best update of a given rank, from the factors alone: no dense matrix is made."""

from __future__ import annotations

import torch

from utils.adapters.factors import ModuleFactors


def truncated(factors: ModuleFactors, rank: int) -> ModuleFactors:
    """The closest update of at most `rank` (Eckart and Young 1936), in float32, with balanced factors and scale 1.

    QR of both factors leaves a core of r x r, whose SVD is that of the update. Its relative error is
    sqrt(sum_{i > rank} s_i^2) / ||.||, see `tail`.
    """
    q_Or, q_Ir, u_rr, s_r, v_rr = _decomposed(factors)
    keep = min(rank, s_r.shape[-1])
    root_r = s_r[..., :keep].sqrt()
    b_Or = (q_Or @ u_rr[..., :keep]) * root_r.unsqueeze(-2)
    a_rI = root_r.unsqueeze(-1) * (v_rr[..., :keep, :] @ q_Ir.mT)
    return ModuleFactors(a_rI.float().contiguous(), b_Or.float().contiguous(), 1.0)


def tail(factors: ModuleFactors, rank: int) -> float:
    """Relative Frobenius error of `truncated`, from the singular values that it leaves out."""
    *_, s_r, _ = _decomposed(factors)
    total = float(s_r.square().sum())
    return (float(s_r[..., rank:].square().sum()) / total) ** 0.5 if total else 0.0


def _decomposed(factors: ModuleFactors) -> tuple[torch.Tensor, ...]:
    """(Q of B, Q of A^T, U, S, V^T) in float64, so that B A = Q_B U S V^T Q_A^T."""
    q_Or, r_B = torch.linalg.qr(factors.b_Or.double() * factors.scale)
    q_Ir, r_A = torch.linalg.qr(factors.a_rI.double().mT)
    return q_Or, q_Ir, *torch.linalg.svd(r_B @ r_A.mT, full_matrices=False)
