"""Which weights these are, whatever was put on top of them."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from diffratio.surgery.adapters import base_state


def weights_digest(transformer: nn.Module) -> str:
    """Hex sha256 of the dense weights in float32, whatever method or adapter is applied and wherever they are."""
    digest = hashlib.sha256()
    for key, value in sorted(base_state(transformer).items()):
        if ".router." in key or key.startswith("keep_ratios."):
            continue
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
