"""diffratio: pretrained diffusion transformers made cheaper, and compared fairly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffratio.errors import BudgetUnreachable, DiffratioError

__version__ = "0.1.0"

# public name -> module; imported when first used, so that `import diffratio` stays cheap
_LAZY = {
    "BlockCache": "diffratio.methods.block_cache",
    "BlockDrop": "diffratio.methods.block_drop",
    "DaTo": "diffratio.methods.dato",
    "Dense": "diffratio.methods.dense",
    "DiffCR": "diffratio.methods.diffcr",
    "ExternalCache": "diffratio.methods.external_cache",
    "FewerSteps": "diffratio.methods.fewer_steps",
    "GuidanceInterval": "diffratio.methods.guidance_interval",
    "Hand": "diffratio.methods.hand",
    "Importance": "diffratio.methods.importance",
    "LiteUncond": "diffratio.methods.lite_uncond",
    "Measured": "diffratio.methods.measured",
    "MoD": "diffratio.methods.mod",
    "RandomKeep": "diffratio.methods.random_keep",
    "SDTM": "diffratio.methods.sdtm",
    "SDTMCached": "diffratio.methods.sdtm_cached",
    "ToDo": "diffratio.methods.todo",
    "ToFu": "diffratio.methods.tofu",
    "ToMe": "diffratio.methods.tome",
    "LatencyTable": "diffratio.cost.table",
    "SamplingRun": "diffratio.cost.run",
    "KeepSchedule": "diffratio.routing.schedule",
    "StepSchedule": "diffratio.methods.step_schedule",
    "TokenGrid": "diffratio.tokens.grid",
    "apply_": "diffratio.surgery",
    "remove_": "diffratio.surgery",
    "attach_": "diffratio.surgery",
    "detach_": "diffratio.surgery",
    "compile_": "diffratio.surgery",
    "summary": "diffratio.surgery",
    "LoraSettings": "diffratio.surgery",
    "add_lora_": "diffratio.surgery",
    "merge_lora_": "diffratio.surgery",
    "macs": "diffratio.surgery",
    "for_budget": "diffratio.surgery",
    "find_step_schedule": "diffratio.surgery",
    "calibrate": "diffratio.sensitivity",
    "load_cost_table": "diffratio.cost.table",
    "load_step_schedule": "diffratio.methods.step_schedule",
    "load_sensitivity": "diffratio.sensitivity",
    "load_transformer": "diffratio.checkpoint",
    "load_pipeline": "diffratio.checkpoint",
    "export": "diffratio.checkpoint",
    "export_adapter": "diffratio.checkpoint",
}

if TYPE_CHECKING:
    from diffratio.checkpoint import export as export
    from diffratio.checkpoint import export_adapter as export_adapter
    from diffratio.checkpoint import load_pipeline as load_pipeline
    from diffratio.checkpoint import load_transformer as load_transformer
    from diffratio.cost.run import SamplingRun as SamplingRun
    from diffratio.cost.table import LatencyTable as LatencyTable
    from diffratio.cost.table import load_cost_table as load_cost_table
    from diffratio.methods.block_cache import BlockCache as BlockCache
    from diffratio.methods.block_drop import BlockDrop as BlockDrop
    from diffratio.methods.dato import DaTo as DaTo
    from diffratio.methods.dense import Dense as Dense
    from diffratio.methods.diffcr import DiffCR as DiffCR
    from diffratio.methods.external_cache import ExternalCache as ExternalCache
    from diffratio.methods.fewer_steps import FewerSteps as FewerSteps
    from diffratio.methods.guidance_interval import GuidanceInterval as GuidanceInterval
    from diffratio.methods.hand import Hand as Hand
    from diffratio.methods.importance import Importance as Importance
    from diffratio.methods.lite_uncond import LiteUncond as LiteUncond
    from diffratio.methods.measured import Measured as Measured
    from diffratio.methods.mod import MoD as MoD
    from diffratio.methods.random_keep import RandomKeep as RandomKeep
    from diffratio.methods.sdtm import SDTM as SDTM
    from diffratio.methods.sdtm_cached import SDTMCached as SDTMCached
    from diffratio.methods.step_schedule import StepSchedule as StepSchedule
    from diffratio.methods.step_schedule import load_step_schedule as load_step_schedule
    from diffratio.methods.todo import ToDo as ToDo
    from diffratio.methods.tofu import ToFu as ToFu
    from diffratio.methods.tome import ToMe as ToMe
    from diffratio.routing.schedule import KeepSchedule as KeepSchedule
    from diffratio.sensitivity import calibrate as calibrate
    from diffratio.sensitivity import load_sensitivity as load_sensitivity
    from diffratio.surgery import LoraSettings as LoraSettings
    from diffratio.surgery import add_lora_ as add_lora_
    from diffratio.surgery import apply_ as apply_
    from diffratio.surgery import attach_ as attach_
    from diffratio.surgery import compile_ as compile_
    from diffratio.surgery import detach_ as detach_
    from diffratio.surgery import find_step_schedule as find_step_schedule
    from diffratio.surgery import for_budget as for_budget
    from diffratio.surgery import macs as macs
    from diffratio.surgery import merge_lora_ as merge_lora_
    from diffratio.surgery import remove_ as remove_
    from diffratio.surgery import summary as summary
    from diffratio.tokens.grid import TokenGrid as TokenGrid

__all__ = ["BudgetUnreachable", "DiffratioError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("backbones", "methods", "cost", "tokens", "routing", "sampling", "evaluation"):
        return importlib.import_module(f"diffratio.{name}")
    raise AttributeError(f"module 'diffratio' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
