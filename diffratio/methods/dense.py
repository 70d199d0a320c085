"""`dense`: the control that computes everything."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio.methods.base import Method, MethodConfig, register


@dataclass(frozen=True)
class Dense(MethodConfig):
    """Nothing is reduced. Applying it still prepares a transformer for training (label dropout moves to the data)."""


@register
class DenseMethod(Method):
    """Every token in every block."""

    name = "dense"
    config_class = Dense
    token_level = False
