"""Looks for routing that learns nothing: routers that score all tokens alike, ratios that stand still."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from diffratio.training.module import Training

EQUAL = 1e-4  # spread of a router's logits over tokens below which their order is noise; a fresh router has 0.1 to 1
STILL = 1e-6  # keep ratio
_PATIENCE = 5  # looks at learned ratios before standing still is worth a warning


class RoutingHealth(Callback):
    """Every few steps logs how far apart the router logits are and how far the ratios have moved; warns once of each.

    Logged are `routing/logit_std`, the smallest over layers of the standard deviation over tokens on that step's batch,
    and `ratios/moved`, the largest distance of a keep ratio from where it began. One read of the device a look.

    Args:
        every: steps between looks.
    """

    def __init__(self, every: int = 10) -> None:
        self.every, self.looks = every, 0
        self.warned: set[str] = set()
        self._hooks: list[Any] = []
        self._spreads: dict[int, Tensor] = {}

    def _due(self, trainer: Trainer) -> bool:
        return (trainer.global_step + 1) % self.every == 0

    def on_train_batch_start(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        if not self._due(trainer) or self._hooks:
            return
        for layer, router in enumerate(getattr(module.method, "routers", ())):
            self._hooks.append(router.register_forward_hook(self._noting(layer)))

    def _noting(self, layer: int) -> Any:
        def note(router: Any, inputs: Any, logits: Tensor) -> None:
            if logits.shape[1] > 1:
                spread = logits.detach().std(dim=1).max()  # (B, N) -> the most decided sample
                self._spreads[layer] = torch.maximum(spread, self._spreads.get(layer, spread))

        return note

    def on_train_batch_end(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        if not self._hooks:
            return
        self._remove()
        spreads, self._spreads = self._spreads, {}
        if not spreads:
            return
        values = torch.stack(list(spreads.values())).tolist()
        module.log("routing/logit_std", min(values))
        equal = [layer for layer, value in zip(spreads, values, strict=True) if value < EQUAL]
        if equal:
            self._warn(
                trainer,
                "routers",
                f"the routers of layers {', '.join(map(str, equal))} score all tokens alike at step "
                f"{trainer.global_step} (spread below {EQUAL:g}): what they keep is arbitrary; change "
                "optimizer.router_lr, or look at the input of these blocks",
            )
        if module.learning_ratios:
            self._look_at_ratios(trainer, module)
        elif module.keep_ratios is not None:
            module.log("ratios/moved", 0.0)  # Lightning would repeat the last value

    def _look_at_ratios(self, trainer: Trainer, module: Training) -> None:
        moved = module.ratios_moved()
        module.log("ratios/moved", moved)
        self.looks += 1
        if moved < STILL and self.looks >= _PATIENCE:
            self._warn(
                trainer,
                "ratios",
                f"no keep ratio has moved in {trainer.global_step} steps: they learn nothing; raise optimizer.ratio_lr "
                "or lower budget.target",
            )

    def _warn(self, trainer: Trainer, kind: str, text: str) -> None:
        if kind not in self.warned and trainer.is_global_zero:
            print(f"diffratio: warning: {text}", file=sys.stderr, flush=True)
        self.warned.add(kind)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_exception(self, trainer: Trainer, module: Training, exception: BaseException) -> None:  # type: ignore[override]
        self._remove()
