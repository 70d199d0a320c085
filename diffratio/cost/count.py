"""MACs that really run: torch's counter around every forward of a module, the check on the analytic figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def count_macs(module: nn.Module, work: Callable[[], object]) -> int:
    """Counts matrix products and convolutions in every forward that `work` makes of a module.

    Attention runs as two matrix products, because the counter knows no fused CPU kernel. Matrix-vector products (a
    router's score) and element-wise work are not counted, by torch's own rule.

    Args:
        module: whose forwards count; what `work` does beside them (decoding latents, say) does not.
        work: called once, without gradients.

    Returns:
        MACs, summed over all forwards and all samples in them.

    Example:
        >>> layer = nn.Linear(3, 5)
        >>> count_macs(layer, lambda: layer(torch.zeros(2, 3)))
        30
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    flops, forward, own = 0, module.forward, module.__dict__.get("forward")

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal flops
        with FlopCounterMode(display=False) as counter:
            result = forward(*args, **kwargs)
        flops += counter.get_total_flops()
        return result

    # the bound method, not a hook: hooks run outside the forward, where the counter loses track of the modules
    module.__dict__["forward"] = counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            work()
    finally:
        del module.__dict__["forward"]
        if own is not None:  # accelerate's hooks stand there too
            module.__dict__["forward"] = own
    return flops // 2
