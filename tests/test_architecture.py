"""Who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffratio

PACKAGE = Path(diffratio.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

LEAVES = {"errors", "files", "catalog", "plain"}  # anyone may import them
_BASE = {"tokens", "cost"}
_MODELS = _BASE | {"routing", "methods", "backbones"}
_SURGERY = _MODELS | {"surgery", "conditions", "inpainting"}
_SAMPLING = _SURGERY | {"sampling", "checkpoint"}
_SENSITIVITY = _SAMPLING | {"objectives"}
# room -> rooms it may import, each also what stands before it there
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "catalog": set(),
    "plain": {"errors"},
    "tokens": set(),
    "conditions": set(),
    "inpainting": set(),
    "cost": {"tokens"},
    "routing": _BASE,
    "backbones": _BASE,
    "methods": _BASE | {"routing"},
    "surgery": _MODELS,
    "objectives": _BASE | {"routing", "inpainting"},
    "sampling": _SURGERY,
    "checkpoint": _SURGERY | {"sampling"},
    "sensitivity": _SENSITIVITY,
    "search": _SENSITIVITY | {"sensitivity", "evaluation"},  # for its features and plots
    "evaluation": _SENSITIVITY | {"sensitivity"},  # the paired validation loss is the objective's own
    "data": _SAMPLING | {"objectives", "training"},
    "training": _SAMPLING | {"objectives", "data", "sensitivity"},
    "bench": _SAMPLING | {"objectives", "data", "training", "evaluation", "sensitivity"},
}
HYDRA = {"cli", "training/run.py"}
LIGHTNING = {"data", "training"}


def room_of(path: Path) -> str:
    """`methods/tome.py` -> methods, `cli.py` -> cli."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Every imported module, wherever in the file the import stands."""
    package = ("diffratio", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports_of(path)]
    rooms = {names[1] for names in parts if names[0] == "diffratio" and len(names) > 1}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}


def may_import(path: Path) -> set[str] | None:
    """None for what sits on top of everything: the command line, and the package itself with its lazy names."""
    room = room_of(path)
    if room in ("cli", "cli_sample", "__init__", "__main__"):
        return None
    return ALLOWED.get(room, set()) | LEAVES | {room}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_rooms_import_only_what_stands_below_them(path: Path) -> None:
    allowed = may_import(path)
    if allowed is not None:
        too_high = rooms_imported(path) - allowed
        assert not too_high, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(too_high))}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_hydra_and_lightning_stay_in_their_rooms(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    room, relative = room_of(path), path.relative_to(PACKAGE).as_posix()
    if room not in HYDRA and relative not in HYDRA:
        assert not roots & {"hydra", "omegaconf"}
    if room not in LIGHTNING:
        assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "tokens"], ids=str)
def test_tokens_import_torch_alone(path: Path) -> None:
    third_party = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"diffratio"}
    assert third_party <= {"torch"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_most_files_are_short() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] < 200


def test_the_reader_of_imports_sees_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "surgery.py").touch()
    (tmp_path / "cost").mkdir()
    source = (
        "import torch\ndef f():\n    from diffratio import surgery\n    from ..cost import run\n    import hydra.core\n"
    )
    (tmp_path / "tokens" / "plan.py").write_text(source)
    path = tmp_path / "tokens" / "plan.py"
    assert set(imports_of(path)) >= {"torch", "diffratio.surgery", "diffratio.cost.run", "hydra.core"}
    assert rooms_imported(path) == {"surgery", "cost"}


HEAVY = ["torch", "lightning", "diffusers", "transformers", "datasets", "hydra", "omegaconf", "numpy", "scipy"]
HEAVY += ["matplotlib", "jinja2", "torchmetrics", "wandb"]


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, time; start = time.process_time(); import diffratio; spent = time.process_time() - start; "
        f"print(spent, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, *loaded = done.stdout.split()
    assert loaded == []
    assert float(spent) < 0.5


def test_listing_names_imports_nothing_heavy_of_our_own() -> None:
    """Names come from registries; modules of methods and families are imported when they are used."""
    code = (
        "import sys; from diffratio.methods import methods; from diffratio.backbones import backbones; "
        "assert methods() and backbones(); print(*[name for name in ('diffusers', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_exists() -> None:
    for name in diffratio.__all__:
        assert getattr(diffratio, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = diffratio.nonsense
