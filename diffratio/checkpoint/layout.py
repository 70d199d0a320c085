"""What lies where in a checkpoint folder, and where checkpoints are found."""

from __future__ import annotations

import re
from pathlib import Path

from diffratio.checkpoint.card import read_card
from diffratio.errors import DiffratioError, unknown
from diffratio.files import read_json

CARD, ROUTING, INDEX, README = "card.json", "routing.json", "model_index.json", "README.md"
TRANSFORMER, SCHEDULER, VAE = "transformer", "scheduler", "vae"
DENSE_WEIGHTS = "diffusion_pytorch_model.safetensors"
# another name than diffusers': from_pretrained must fail there instead of loading a silently dense model
ROUTED_WEIGHTS = "diffratio_model.safetensors"
ADAPTER = "diffratio_adapter.json"  # beside peft's own adapter_config.json
KINDS = ("dense", "routed", "transformer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_kind(folder: str | Path) -> str:
    """`routed`, `dense` (a pipeline folder) or `transformer` (a bare diffusers transformer folder).

    An adapter folder counts as what it makes of its base.

    Raises:
        DiffratioError: there is no such folder, or it is not a checkpoint.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DiffratioError(
            f"checkpoint {str(path)!r} is {'a file' if path.exists() else 'missing'}; give a checkpoint folder, "
            "`diffratio ls checkpoints` names those that ship"
        )
    if is_adapter(path):
        document = read_json(path / ADAPTER, "adapter")
        return "routed" if isinstance(document, dict) and document.get("method") else "dense"
    if (path / ROUTING).is_file():
        return "routed"
    if (path / TRANSFORMER / "config.json").is_file():
        return "dense"
    if (path / "config.json").is_file():
        return "transformer"
    raise DiffratioError(
        f"{str(path)!r} is not a checkpoint: it holds neither {TRANSFORMER}/config.json nor config.json; "
        "`diffratio export RUN --out FOLDER` makes one from a training run"
    )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds adapter weights alone, which stand on a base."""
    return (Path(folder) / ADAPTER).is_file()


def require_kind(folder: str | Path, kind: str) -> Path:
    """The folder, if it holds a checkpoint of that kind; a bare transformer folder counts as dense.

    Raises:
        DiffratioError: it is of another kind.
    """
    if kind not in KINDS:
        raise unknown("checkpoint kind", kind, KINDS)
    found = checkpoint_kind(folder)
    if found != kind and not (kind == "dense" and found == "transformer"):
        way_out = {
            "routed": "train one from it with method=diffcr and export it",
            "dense": "give the dense checkpoint that it was fine-tuned from",
            "transformer": f"give its {TRANSFORMER}/ folder",
        }[kind]
        raise DiffratioError(f"checkpoint {str(folder)!r} is {found}, and a {kind} one is needed here; {way_out}")
    return Path(folder)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that this package wrote."""
    try:
        read_card(folder)
    except DiffratioError:
        return False
    return (folder / TRANSFORMER).is_dir() or is_adapter(folder)


def checkpoints_root() -> Path | None:
    """Folder of the checkpoints that ship beside the package, or None."""
    import diffratio

    root = Path(diffratio.__file__).resolve().parent.parent / "checkpoints"
    return root if root.is_dir() else None


def shipped_beside(name: str, folder: str, suffix: str) -> str:
    """What a name stands for where files ship beside the checkpoints, under the names of these.

    Args:
        name: an existing path, or the name of a checkpoint.
        folder: of such files, below that of the checkpoints.
        suffix: of such files.

    Returns:
        The shipped file; the name itself, if it is a path that exists (but for the checkpoint) or if no file ships
        under it.
    """
    root, path = checkpoints_root(), Path(name)
    if root is None or "/" in name or (path.exists() and not (path / CARD).is_file()):
        return name
    shipped = root / folder / f"{name}{suffix}"
    return str(shipped) if shipped.is_file() else name


def list_checkpoints(root: str | Path | None = None) -> dict[str, str]:
    """Name and one line of every checkpoint below a folder (default: those that ship); one with a bad card says so."""
    base = checkpoints_root() if root is None else Path(root)
    lines: dict[str, str] = {}
    for folder in sorted(base.iterdir()) if base is not None and base.is_dir() else []:
        if not (folder / CARD).is_file():
            continue
        try:
            card = read_card(folder)
            parts = [f"{checkpoint_kind(folder)} {card.backbone}", card.data, f"{card.sampler.steps} steps"]
            parts += [f"{key} {value:.4g}" for key, value in card.metrics.items() if isinstance(value, float | int)][:4]
            lines[folder.name] = ", ".join(part for part in parts if part)
        except DiffratioError as error:
            lines[folder.name] = f"unreadable: {error}"
    return lines


def resolve(source: str | Path) -> Path | str:
    """What a checkpoint's name stands for.

    Args:
        source: an existing path, the name of a checkpoint that ships, or a hub id of the form owner/name.

    Returns:
        The folder, or the hub id.

    Raises:
        DiffratioError: it is none of these.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    root = checkpoints_root()
    name = str(source)
    if root is not None and "/" not in name and (root / name).is_dir():
        return root / name
    # `runs/typo` has the form of a hub id, too: where `runs` is a folder here, a path was meant
    if _HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        return name
    if len(path.parts) > 1:
        raise DiffratioError(
            f"checkpoint {name!r} is missing; give a checkpoint folder, "
            "`diffratio ls checkpoints` names those that ship"
        )
    raise unknown("checkpoint", name, list_checkpoints())
