"""LoRA adapters (peft) in a transformer, converted or not: put in, looked through, merged."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffratio.backbones import Backbone, backbone_of
from diffratio.errors import DiffratioError, shortened, unknown
from diffratio.surgery.state import attachment, is_applied

ADAPTER = "default"  # peft's own name of a model's first adapter
_BASE = "base_layer."  # where peft's layers keep the layer that they stand around
_ATTENTION, _BLOCK = "attention", "block"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank updates `W + alpha / rank B A` of linear layers, everything else of the base frozen.

    Args:
        rank: columns of B; lower trains and stores less.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of A while training, in [0, 1).
        targets: whose linear layers get one: `attention` (every attention site of the backbone), a site of it such as
            `feed_forward`, or `block` (all of the blocks, modulation and embedders included).

    Source: arXiv 2106.09685.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (_ATTENTION, "feed_forward")

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise DiffratioError(
                f"lora.rank {self.rank!r} must be an integer of at least 1; lora=none trains without LoRA"
            )
        if not 0 < self.alpha < float("inf"):
            raise DiffratioError(f"lora.alpha {self.alpha!r} must be a positive number; 16 is usual")
        if not 0 <= self.dropout < 1:
            raise DiffratioError(f"lora.dropout {self.dropout!r} is outside [0, 1); 0 is off")
        if not self.targets:
            raise DiffratioError("lora.targets is empty; name sites of the backbone, such as [attention,feed_forward]")


def require_peft() -> Any:
    """The peft module.

    Raises:
        DiffratioError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise DiffratioError("LoRA needs peft: pip install 'diffratio[lora]' -c constraints.txt") from None
    return peft


def lora_targets(transformer: nn.Module, targets: tuple[str, ...] = LoraSettings.targets) -> list[str]:
    """Full names of the linear layers that targets stand for, found through the backbone's sites.

    Raises:
        DiffratioError: a target that the backbone does not have, or one without a linear layer.
    """
    backbone = backbone_of(transformer)
    sites = {site: [site] for site in backbone.sites}
    sites |= {_BLOCK: [], _ATTENTION: [site for site in backbone.sites if site.endswith(_ATTENTION)]}
    names = {id(module): name for name, module in transformer.named_modules()}
    found: dict[str, None] = {}
    for target in targets:
        if target not in sites:
            raise unknown(f"lora target of backbone {backbone.name}", target, sites)
        blocks = backbone.blocks(transformer)
        modules = [module for block in blocks for module in _at(backbone, block, sites[target])]
        linear = [names[id(one)] for module in modules for one in module.modules() if isinstance(one, nn.Linear)]
        if not linear:
            raise DiffratioError(f"lora target {target!r} holds no linear layer in backbone {backbone.name}")
        found |= dict.fromkeys(linear)
    return list(found)


def _at(backbone: Backbone, block: nn.Module, sites: list[str]) -> Iterator[nn.Module]:
    """The submodules of a block that sites stand for; without sites the block."""
    if not sites:
        yield block
    for site in sites:
        try:
            yield from backbone.site_modules(block, site)
        except AttributeError:  # blocks of several kinds: not every site is in every one
            continue


def add_lora_(transformer: Any, settings: LoraSettings | None = None) -> Any:
    """Puts LoRA into a transformer, in place, and freezes the base; at first it changes no output.

    What an applied method has learned or learns (routers, keep ratios) stays as trainable as it was, where peft alone
    would freeze it. The layers are peft's: its tools, and those of diffusers, work on them.

    Args:
        transformer: of a known family, dense or converted; `apply_` may also come afterwards.
        settings: rank, scale, dropout, targets; None takes the defaults.

    Returns:
        The transformer.

    Raises:
        DiffratioError: peft is missing, adapters are there already, an unknown target, or a rank beyond all widths.

    Example:
        >>> import diffratio
        >>> transformer = diffratio.apply_(diffratio.backbones.get_backbone("dit").tiny(), diffratio.MoD(keep=0.5))
        >>> _ = diffratio.add_lora_(transformer, diffratio.LoraSettings(rank=4))
        >>> sorted({name.split(".")[-1] for name, one in transformer.named_parameters() if one.requires_grad})
        ['bias', 'weight']
    """
    peft, settings = require_peft(), settings or LoraSettings()
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    names = lora_targets(transformer, settings.targets)
    widest = max(max(transformer.get_submodule(name).weight.shape) for name in names)
    if settings.rank > widest:
        raise DiffratioError(
            f"lora.rank {shortened(settings.rank)} is more than the {widest} features of the widest target; 4 to 64 is "
            "usual, and lora=none trains all weights"
        )
    config = peft.LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=names)
    return inject_(transformer, config)


def inject_(transformer: Any, config: Any) -> Any:
    """Puts in what a peft config describes; methods' own parameters stay as trainable as they were.

    Raises:
        DiffratioError: adapters are there already.
    """
    if present := adapter_layers(transformer):
        raise DiffratioError(
            f"{type(transformer).__name__} has adapters in {len(present)} layers already; "
            "diffratio.merge_lora_ puts them into the weights"
        )
    own = [(one, one.requires_grad) for module in _learned(transformer) for one in module.parameters()]
    require_peft().inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
    for parameter, learning in own:
        parameter.requires_grad_(learning)
    return transformer.train(transformer.training)  # new layers begin in training mode


def _learned(transformer: nn.Module) -> list[nn.Module]:
    methods = attachment(transformer).methods if is_applied(transformer) else []
    return [module for one in methods for module in [*(one.block_modules() or []), *one.root_modules().values()]]


def adapter_layers(transformer: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the layer that they stand around."""
    if sys.modules.get("peft") is None:  # then there are none, and importing it takes seconds
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


def merge_lora_(transformer: Any) -> Any:
    """Adds the adapters to the weights, in place, and takes their layers out; the weights are trainable again.

    Raises:
        DiffratioError: there are none.
    """
    layers = adapter_layers(transformer)
    if not layers:
        raise DiffratioError(f"{type(transformer).__name__} has no adapters to merge; diffratio.add_lora_ puts some in")
    for name, layer in layers.items():
        transformer.set_submodule(name, _merged(layer))
    transformer.__dict__.pop("peft_config", None)
    transformer.__dict__.pop("_hf_peft_config_loaded", None)
    return transformer.requires_grad_(True)


def _merged(layer: Any) -> nn.Module:
    """The plain layer that computes what an adapter layer computes now."""
    if not layer.disable_adapters:
        layer.merge(safe_merge=True)
    elif layer.merged:
        layer.unmerge()
    base = layer.get_base_layer()
    assert isinstance(base, nn.Module)
    return base


def merged_state(transformer: nn.Module) -> dict[str, Tensor]:
    """State dict with the adapters in the weights, under the plain model's keys; the transformer stays as it is."""
    state = base_state(transformer)
    for name, layer in adapter_layers(transformer).items():  # a copy of one layer at a time
        state |= {f"{name}.{key}": value for key, value in _merged(copy.deepcopy(layer)).state_dict().items()}
    return state


def base_state(transformer: nn.Module) -> dict[str, Tensor]:
    """State dict without the adapters, under the keys of the plain model."""
    layers = adapter_layers(transformer)
    state = {}
    for key, value in transformer.state_dict().items():
        owner = next((name for name in layers if key.startswith(f"{name}.")), None)
        if owner is None:
            state[key] = value
        elif key.startswith(f"{owner}.{_BASE}"):
            state[f"{owner}.{key.removeprefix(f'{owner}.{_BASE}')}"] = value
    return state
