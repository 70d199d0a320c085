"""Puts methods into a transformer or a pipeline, in place, and takes them out again.

Classes are swapped in place for subclasses: state-dict keys stay, a deepcopied model runs its own weights, it pickles,
and no upstream forward is copied.
"""

from diffratio.surgery.accounting import describe, for_budget, forget_counts, is_measured, macs, statistics, summary
from diffratio.surgery.adapters import LoraSettings, adapter_layers, add_lora_, merge_lora_, merged_state
from diffratio.surgery.apply import apply_, compile_, drop_root_module_, remove_
from diffratio.surgery.digest import weights_digest
from diffratio.surgery.measuring import shared_copy
from diffratio.surgery.on_top import cached_by, check_on_top, for_budget_on_top
from diffratio.surgery.pipelines import attach_, detach_
from diffratio.surgery.schedules import find_step_schedule
from diffratio.surgery.state import Attachment, attachment, is_applied
from diffratio.surgery.timing import run_call, time_runs

__all__ = [
    "Attachment",
    "LoraSettings",
    "adapter_layers",
    "add_lora_",
    "apply_",
    "attach_",
    "attachment",
    "cached_by",
    "check_on_top",
    "compile_",
    "describe",
    "detach_",
    "drop_root_module_",
    "find_step_schedule",
    "for_budget",
    "for_budget_on_top",
    "forget_counts",
    "is_applied",
    "is_measured",
    "macs",
    "merge_lora_",
    "merged_state",
    "remove_",
    "run_call",
    "shared_copy",
    "statistics",
    "summary",
    "time_runs",
    "weights_digest",
]
