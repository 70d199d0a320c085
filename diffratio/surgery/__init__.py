"""Puts methods into a transformer or a pipeline, in place, and takes them out again.

Classes are swapped in place for subclasses: state-dict keys stay, a deepcopied model runs its own weights, it pickles,
and no upstream forward is copied.
"""

from diffratio.surgery.accounting import describe, for_budget, macs, summary
from diffratio.surgery.adapters import LoraSettings, adapter_layers, add_lora_, merge_lora_, merged_state
from diffratio.surgery.apply import apply_, compile_, drop_root_module_, remove_
from diffratio.surgery.digest import weights_digest
from diffratio.surgery.pipelines import attach_, detach_
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
    "compile_",
    "describe",
    "detach_",
    "drop_root_module_",
    "for_budget",
    "is_applied",
    "macs",
    "merge_lora_",
    "merged_state",
    "remove_",
    "run_call",
    "summary",
    "time_runs",
    "weights_digest",
]
