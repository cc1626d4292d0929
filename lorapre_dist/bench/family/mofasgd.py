"""MoFaSGD (Mahdavinia, Mahdavi, arXiv 2507.08091), Algorithm 1 and its routine UMF."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import State


@dataclass(frozen=True)
class MoFaSGD:
    """The momentum's SVD ``U S V^T`` of rank r moves along the tangent space; the step is ``U V^T``.

    With the gradient's projection ``U U^T G + G V V^T - U U^T G V V^T`` on the tangent space::

        [U, G V] = QL RL,   [V, G^T U] = QR RR
        inner = RL [[beta S - (1 - beta) U^T G V, (1 - beta) I], [(1 - beta) I, 0]] RR^T        2r x 2r
        inner = u s v^T, of which the r largest are kept;   U <- QL u,  S <- s,  V <- QR v
        theta <- theta - lr U V^T

    Assumed: the first factors are those of ``(1 - beta)`` times the first gradient, which the first step then uses as
    they are; matrices have at least 2 r rows and columns.
    """

    rank: int
    beta: float = 0.9

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """The r largest of the first gradient's SVD."""
        U, S, Vh = torch.linalg.svd((1 - self.beta) * g, full_matrices=False)
        # Copies: a part would keep the whole alive.
        return {"U": U[:, : self.rank].clone(), "S": S[: self.rank].clone(), "V": Vh[: self.rank].T.clone()}

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """See the class."""
        if t > 1:
            self._refresh(g, state)
        theta.sub_(state["U"] @ state["V"].T, alpha=lr)

    def _refresh(self, g: Tensor, state: State) -> None:
        U, S, V, r = state["U"], state["S"], state["V"], self.rank
        GV, GU = g @ V, g.T @ U
        left, right = torch.linalg.qr(torch.cat([U, GV], 1)), torch.linalg.qr(torch.cat([V, GU], 1))
        corner = torch.diag(self.beta * S) - (1 - self.beta) * U.T @ GV
        eye = (1 - self.beta) * torch.eye(r, dtype=g.dtype, device=g.device)
        inner = torch.cat([torch.cat([corner, eye], 1), torch.cat([eye, torch.zeros_like(eye)], 1)])
        u, s, vh = torch.linalg.svd(left.R @ inner @ right.R.T)
        state["U"], state["S"], state["V"] = left.Q @ u[:, :r], s[:r].clone(), right.Q @ vh[:r].T
