"""Muon for the matrices of the layers, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.train_demo.network import DemoModel


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move a batch of matrices towards the nearest orthogonal ones (Newton-Schulz iteration of Muon)."""
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT.contiguous() if transposed else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transposed else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: fewer steps than AdamW for hidden matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices, those of one shape in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                updates = orthogonalise(torch.stack([self._nesterov(w, group["momentum"]) for w in weights]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _nesterov(self, weight: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum"], momentum)


def make_optimisers(model: DemoModel) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and (without decay) the gains."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    adam_groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": 0.01},
        {"params": gains, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(adam_groups, lr=4e-3, betas=(0.9, 0.95), eps=1e-10),
    ]
