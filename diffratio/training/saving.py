"""Checkpoints that survive a kill: written aside, synced, renamed, checksummed, the one before kept."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffratio.errors import DiffratioError, RunFailed
from diffratio.files import atomic_file, sha256

LAST = "last.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Saves whole or not at all, and keeps the checkpoint before as `NAME.prev.ckpt`.

    `NAME.sha256` holds the digests of the file to come and of those that stand there, and is written before the
    renames: whenever the process dies, a whole and known file is left. A digest is of content, whatever its file's
    name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._standing: dict[Path, str] = {}  # whole checkpoints on the disk, with their digests

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves; what was saved before stays good if that fails.

        Raises:
            RunFailed: the disk is full or the folder cannot be written, or the state holds numbers that are not finite.
        """
        path = Path(path)
        before = previous(path)
        _check_finite(checkpoint, path)
        if path not in self._standing:
            self._look(path)
        with _reported(path), atomic_file(path) as temporary:
            with open(temporary, "wb") as handle:
                torch.save(checkpoint, handle)
                handle.flush()
                os.fsync(handle.fileno())
            digest = sha256(temporary)
            known = [digest, *(self._standing[one] for one in (path, before) if one in self._standing)]
            with atomic_file(_sidecar(path)) as sidecar:
                sidecar.write_text("".join(f"{one}\n" for one in known), encoding="ascii")
            if path in self._standing:  # a torn file must not take the place of the good one before it
                os.replace(path, before)
                self._standing[before] = self._standing.pop(path)
        self._standing[path] = digest
        _sync_folder(path.parent)

    def _look(self, path: Path) -> None:
        """Finds what an earlier process left: whole checkpoints to keep, halves of others to remove."""
        for name in (path.name, _sidecar(path).name):
            for half in path.parent.glob(f".{name}.*.tmp"):
                half.unlink(missing_ok=True)
        for one in (path, previous(path)):
            with contextlib.suppress(DiffratioError):
                if one.is_file():
                    read_resumable(one)
                    self._standing[one] = sha256(one)


def previous(path: Path) -> Path:
    """Where the checkpoint before goes: `last.ckpt` -> `last.prev.ckpt`."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def present(folder: Path) -> Path | None:
    """The newest checkpoint file of a run folder that stands there, unread; None without one."""
    last = folder / "checkpoints" / LAST
    return next((path for path in (last, previous(last)) if path.is_file()), None)


def resumable(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder.

    A torn or changed one is reported in one line on standard error, and the one before is taken.

    Returns:
        None where the folder holds no checkpoint.

    Raises:
        DiffratioError: there are checkpoints, and none is whole.
    """
    last = folder / "checkpoints" / LAST
    problems: list[DiffratioError] = []
    for path in (last, previous(last)):
        if not path.is_file():
            continue
        try:
            saved = read_resumable(path)
        except DiffratioError as error:
            problems.append(error)
            continue
        if problems:
            print(
                f"diffratio: {str(problems[0]).split(';')[0]}; going on from {str(path)!r} "
                f"(step {saved['global_step']})",
                file=sys.stderr,
                flush=True,
            )
        return path
    if problems:
        raise problems[0]
    return None


def read_resumable(path: Path) -> dict[str, Any]:
    """What Lightning saved; tensors stay on disk until they are used.

    Raises:
        DiffratioError: the file is damaged, differs from its checksum, or is no checkpoint of a run.
    """
    try:
        known = _digests(path)
        if known and sha256(path) not in known:
            raise ValueError(f"its checksum is not in {_sidecar(path).name}")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(saved, dict):
            raise TypeError(f"it holds a {type(saved).__name__}")
        if missing := {"state_dict", "callbacks", "global_step"} - set(saved):
            raise KeyError(f"it has no {sorted(missing)[0]}")
    except Exception as error:  # torch raises several kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DiffratioError(
            f"checkpoint {str(path)!r} cannot be read ({reason}); copy it again, or train anew in another folder"
        ) from None
    return saved


def _sidecar(path: Path) -> Path:
    return path.with_name(path.stem.removesuffix(".prev") + ".sha256")


def _digests(path: Path) -> list[str]:
    """Digests of the files that are whole; none where they were saved without."""
    sidecar = _sidecar(path)
    return sidecar.read_text(encoding="ascii").split() if sidecar.is_file() else []


def _check_finite(checkpoint: dict[str, Any], path: Path) -> None:
    for name, value in checkpoint["state_dict"].items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RunFailed(
                f"step {checkpoint['global_step']}: {name} holds numbers that are not finite, so the state is not "
                f"saved; {last_good(path.parent.parent)}, lower optimizer.lr"
            )


def last_good(folder: Path | None) -> str:
    """The part of a message that says where to go on from."""
    found = present(folder) if folder is not None else None
    return f"the last good checkpoint is {str(found)!r} (ckpt_path=last)" if found else "there is no checkpoint yet"


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns what a full disk or a read-only folder raises, in torch's words or the system's, into one line."""
    try:
        yield
    except (OSError, RuntimeError, DiffratioError) as error:
        cause = _system_error(error)
        if cause is None and not isinstance(error, DiffratioError):
            raise
        reason = cause.strerror if cause is not None else str(error).split(";")[0]
        raise RunFailed(
            f"checkpoint {str(path)!r} cannot be written ({reason}); {last_good(path.parent.parent)}: "
            "make room and run the command again"
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind torch's."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Makes the renames last through a power failure."""
    with contextlib.suppress(OSError):  # not every file system syncs folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
