"""Files appear whole or not at all: everything is written beside its place and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError

_LARGEST_JSON = 256 << 20  # bytes


def configs_folder() -> Path:
    """The config tree: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def cache_folder() -> Path:
    """What is kept between runs: `DIFFRATIO_CACHE`, else `diffratio` in the user's cache folder."""
    chosen = os.environ.get("DIFFRATIO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffratio"


def writable_folder(folder: str | Path) -> Path:
    """Creates a folder and checks that files can be written into it.

    Raises:
        DiffratioError: it is a file, or cannot be created or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise DiffratioError(
            f"output folder {str(path)!r} is not writable ({error.strerror}); choose another folder"
        ) from None
    return path


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name in the same folder; on success it is synced and renamed to `path`, otherwise removed."""
    path = Path(path)
    writable_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling folder; on success it replaces `path`, otherwise it is removed."""
    path = Path(path)
    writable_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, document: Any) -> None:
    """Writes strict JSON (no NaN) atomically, indented, with a final newline."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, what: str, most: int = _LARGEST_JSON) -> Any:
    """Reads JSON.

    Args:
        path: the file.
        what: it holds, for the message.
        most: bytes that are read.

    Raises:
        DiffratioError: `what` is missing, is not JSON, is larger than it may be, or is nested too deeply.
    """
    try:
        size = Path(path).stat().st_size
        if size > most:
            raise DiffratioError(f"{what}: {str(path)!r} has {size:,} bytes, and at most {most:,} are read")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise DiffratioError(f"{what}: {str(path)!r} is nested too deeply") from None
    except FileNotFoundError:
        raise DiffratioError(f"{what}: no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise DiffratioError(f"{what}: {str(path)!r} cannot be read as JSON ({error})") from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
