"""apply_ and remove_: methods go into a transformer in place and come out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffratio.backbones import Backbone, backbone_of
from diffratio.backbones.widening import inpaints
from diffratio.errors import DiffratioError
from diffratio.methods.base import Method, MethodConfig
from diffratio.surgery.hooks import check_hooks
from diffratio.surgery.modules import BlockMixin, SiteMixin, TransformerMixin
from diffratio.surgery.pipelines import detach_
from diffratio.surgery.state import ATTENTION, Attachment, attachment, is_applied
from diffratio.surgery.swap import swap, unswap


def apply_(transformer: Any, config: MethodConfig | Sequence[MethodConfig], seed: int = 0) -> Any:
    """Puts one method, or step-level ones and a token-level one, into a transformer, in place.

    Step-level methods also go on top of what is applied already (a cache on a routed checkpoint).

    Args:
        transformer: a diffusers transformer of a known family, or a pipeline that holds one.
        config: a method config such as `diffratio.ToMe(ratio=0.5)`, or several. Step-level methods stand outside; of
            several that want to decide about the same step the first one does.
        seed: seed of the methods' draws.

    Returns:
        What was given.

    Raises:
        DiffratioError: no backbone matches, something is applied already, or two token-level methods were given.

    Example:
        >>> import diffratio
        >>> transformer = diffratio.backbones.get_backbone("dit").tiny()
        >>> _ = diffratio.apply_(transformer, diffratio.ToMe(ratio=0.5))
    """
    if not isinstance(transformer, nn.Module) and hasattr(transformer, "transformer"):
        apply_(transformer.transformer, config, seed)
        return transformer
    backbone = backbone_of(transformer)
    configs = [config] if isinstance(config, MethodConfig) else list(config)
    present = list(attachment(transformer).methods) if is_applied(transformer) else []
    if present and not (configs and all(_goes_on_top(one, present) for one in configs)):
        names = ", ".join(method.name for method in present)
        raise DiffratioError(f"{names} is applied to this transformer already; diffratio.remove_ it first")
    if not configs or not all(isinstance(one, MethodConfig) for one in configs):
        raise DiffratioError(f"apply_ takes a method config such as diffratio.ToMe(ratio=0.5), got {config!r}")
    description = backbone.describe(transformer)
    methods = [one.method(one, description) for one in configs]
    for one, method in zip(configs, methods, strict=True):
        if getattr(one, "router_sees_mask", False) and not (
            inpaints(transformer) and len(getattr(method, "routers", []))
        ):
            raise DiffratioError(
                f"{method.name}: router_sees_mask=true is for routers of inpainting models (inpaint=default), and here "
                f"{'are no routers' if inpaints(transformer) else 'is no mask'}; leave it out"
            )
    token_level = [method.name for method in methods if method.token_level]
    if len(token_level) > 1:
        raise DiffratioError(f"two token-level methods ({' and '.join(token_level)}) cannot share a transformer")
    for method in methods:
        method.check_beside([other for other in (*methods, *present) if other is not method])
    if present:
        state = attachment(transformer)
        state.add(methods)
        try:
            for method in methods:
                method.attach(transformer, list(backbone.blocks(transformer)), backbone.site_modules)
        except DiffratioError:
            state.methods = present
            raise
        return transformer
    state = Attachment(backbone, methods, {}, seed)
    sites = tuple(dict.fromkeys(site for one in (state.token_method, *state.watching) for site in one.sites()))
    for site in sites:
        if site not in backbone.sites:
            names = ", ".join(method.name for method in methods)
            raise DiffratioError(
                f"{names}: backbone {backbone.name} has no site {site!r}; it has {', '.join(backbone.sites)}"
            )
    blocks = backbone.blocks(transformer)
    swapped = [module for block in blocks for site in sites for module in backbone.site_modules(block, site)]
    check_hooks(
        transformer,
        [transformer, *blocks, *swapped],
        any(method.block_modules() is not None or method.root_modules() for method in methods),
    )
    attention = _own_attention_(backbone, transformer, state.token_method)
    state.prepared = backbone.prepare_(transformer) | {ATTENTION: attention}
    reference = next(transformer.parameters())
    for layer, block in enumerate(blocks):
        for site in sites:
            for module in backbone.site_modules(block, site):
                swap(module, SiteMixin, state, layer=layer, site=site)
        swap(block, BlockMixin, state, layer=layer)
    for method in methods:
        for layer, module in enumerate(method.block_modules() or []):
            backbone.blocks(transformer)[layer].router = module.to(reference.device)
        for name, module in method.root_modules().items():
            setattr(transformer, name, module.to(reference.device))
            state.added += (name,)
    swap(transformer, TransformerMixin, state)
    try:
        state.attach(transformer)
    except DiffratioError:
        remove_(transformer)
        raise
    return transformer


def _own_attention_(backbone: Backbone, transformer: nn.Module, method: Method) -> Any:
    """Puts our attention processors in; the ones that were there, or None where the method goes on with those."""
    # the stock processors of a family with positions know one table for all samples
    needed = method.indexes_attention or (method.token_level and backbone.positions is not None)
    if not (needed or method.nests_attention):
        return None
    try:
        return backbone.index_attention_(transformer)
    except DiffratioError:
        if needed:
            raise
        return None


def _goes_on_top(config: object, present: Sequence[Method]) -> bool:
    return (
        isinstance(config, MethodConfig)
        and not config.method.token_level
        and not config.method.learned
        and config.method not in {type(method) for method in present}
        and any(method.token_level for method in present)
    )


def remove_(transformer: Any) -> Any:
    """Takes everything out again, exactly; parameters that a method added are dropped.

    Raises:
        DiffratioError: nothing is applied.
    """
    if not isinstance(transformer, nn.Module) and hasattr(transformer, "transformer"):
        detach_(transformer)
        remove_(transformer.transformer)
        return transformer
    state = attachment(transformer)
    state.detach()
    for name in state.added:
        drop_root_module_(transformer, name)
    for method in state.methods:
        if method.block_modules() is not None:
            for block in state.backbone.blocks(transformer):
                del block.router
    state.backbone.undo_(transformer, state.prepared)
    if state.prepared[ATTENTION] is not None:
        state.backbone.plain_attention_(transformer, state.prepared[ATTENTION])
    for module in list(transformer.modules()):
        unswap(module)
    return transformer


def compile_(transformer: nn.Module, **options: Any) -> nn.Module:
    """Compiles the inner blocks: one function for all of them, `torch.compile` options as given.

    With `dynamic=True` one graph serves every number of kept tokens.
    """
    attachment(transformer).compile_options = {"dynamic": True} | options
    return transformer


def drop_root_module_(transformer: nn.Module, name: str) -> None:
    """Unregisters a module that a method no longer needs (frozen keep ratios)."""
    if name in dict(transformer.named_children()):
        delattr(transformer, name)
