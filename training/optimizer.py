"""The optimizer "muon": orthogonalised momentum for the matrices inside the network, AdamW for everything else."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the other parameters, as one optimizer with one learning rate.

    Muon's steps are scaled to the size of AdamW's (`match_rms_adamw`), so that both take the rates that AdamW does.
    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), Liu et al. 2025 (arXiv 2502.16982).

    Args:
        hidden: matrices inside the network.
        others: embeddings, the output layer, biases and norms; groups of parameters with their own `weight_decay`.
        lr: of both.
        weight_decay: of the matrices.
        betas: AdamW's; Muon's momentum is its own default.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._parts: dict[str, torch.optim.Optimizer] = {"muon": muon}
        if others:  # adapters have matrices alone
            self._parts["adamw"] = torch.optim.AdamW(others, lr=lr, betas=betas)
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """The groups are those of the parts themselves: a scheduler that changes them changes the parts."""
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        if closure is not None:
            raise ValueError("MuonWithAdamW got a closure, expected none: compute the gradients before step().")
        for part in self._parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()


def muon_of(
    model: nn.Module,
    *,
    outside: list[nn.Module],
    decayed: Collection[str],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> MuonWithAdamW:
    """Muon for a model's hidden matrices, AdamW for what else it trains.

    Args:
        model: with its frozen parts frozen.
        outside: its layers whose matrices are not hidden ones: the embeddings, the output layers.
        decayed: names of the parameters that weight decay is for.
        learning_rate: of both.
        weight_decay: of both.
        betas: AdamW's.
    """
    not_hidden = {id(value) for layer in outside for value in layer.parameters()}
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    hidden = {name for name, value in trained if value.ndim == 2 and id(value) not in not_hidden}
    others = [
        {"params": [value for name, value in trained if name not in hidden and (name in decayed) == is_decayed]}
        | {"weight_decay": weight_decay if is_decayed else 0.0}
        for is_decayed in (True, False)
    ]
    return MuonWithAdamW(
        [value for name, value in trained if name in hidden],
        [group for group in others if group["params"]],
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=betas,
    )
