"""Files appear whole or not at all: everything is written beside its place and renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from diffratio.errors import DiffratioError

if TYPE_CHECKING:
    from PIL import Image

_LARGEST_JSON = 64 << 20  # bytes
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_DEEPEST = 64  # lists and objects inside each other
_LARGEST_INTEGER = 1 << 64  # beyond it, floats and tensors overflow


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
    # machines that share a folder may give two processes one number
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
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


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """Strict JSON from elsewhere, in bounds that everything that reads it can take for granted.

    Args:
        text: the document.
        finite: whether NaN and Infinity are refused; diffusers writes the latter into schedulers.

    Raises:
        ValueError: not JSON, lists and objects nested more than 64 deep, a key twice in one object, an integer of more
            than 64 bits, a number that is not finite, or half a surrogate pair in a text.

    Example:
        >>> parse_json('{"bins": [[10, 5]]}')
        {'bins': [[10, 5]]}
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [document]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, float) and finite and not math.isfinite(one):
                raise ValueError(f"{one} is no finite number")
            elif isinstance(one, int) and abs(one) > _LARGEST_INTEGER:
                raise ValueError(f"the integer {str(one)[:20]}... has more than 64 bits")
        if not inner:
            break
        level = inner
    else:
        raise ValueError("it is nested too deeply")
    halves = (b"\\ud", b"\\uD") if isinstance(text, bytes) else ("\\ud", "\\uD")
    if any(half in text for half in halves):  # type: ignore[operator]
        json.dumps(document, ensure_ascii=False).encode()  # its UnicodeEncodeError is a ValueError
    return document


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twin!r:.80} stands twice in one object")
    return found


def read_json(path: str | Path, what: str, most: int = _LARGEST_JSON, finite: bool = True) -> Any:
    """Reads JSON; `parse_json` says what is refused.

    Args:
        path: the file.
        what: it holds, for the message.
        most: bytes that are read.
        finite: whether NaN and Infinity are refused.

    Raises:
        DiffratioError: `what` is missing, is not JSON, or is out of bounds; names the file.
    """
    try:
        return parse_json(read_text(path, what, most), finite)
    except DiffratioError:
        raise
    except ValueError as error:
        raise DiffratioError(f"{what}: {str(path)!r} cannot be read as JSON ({error})") from None


def read_text(path: str | Path, what: str, most: int = _LARGEST_JSON) -> str:
    """Reads a text file.

    Args:
        path: the file.
        what: it holds, for the message.
        most: bytes that are read.

    Raises:
        DiffratioError: `what` is missing, is no ordinary file (a pipe would be waited for), is larger than it may be,
            or is not UTF-8; names the file.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise DiffratioError(f"{what}: {str(path)!r} is no file")
        if status.st_size > most:
            raise DiffratioError(f"{what}: {str(path)!r} has {status.st_size:,} bytes, and at most {most:,} are read")
        return Path(path).read_text(encoding="utf-8")
    except DiffratioError:
        raise
    except FileNotFoundError:
        raise DiffratioError(f"{what}: no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise DiffratioError(f"{what}: {str(path)!r} cannot be read ({error})") from None


def open_picture(source: str | Path | IO[bytes]) -> Image.Image:
    """Opens a picture of an ordinary format; its pixels are decoded later.

    Formats that run other programs (PostScript) or that nobody keeps pictures in are not tried, and a header that
    announces more pixels than fit into memory is an error.

    Args:
        source: a file or an open one.

    Raises:
        Exception: what PIL raises on a damaged file, OSError for the most part.
    """
    import warnings

    from PIL import Image

    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(source))  # nor a pipe, which would be waited for
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(source, formats=_PICTURES)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """A picture as models see it: upright, 16 bits scaled to 8, transparent pixels white.

    Args:
        image: an opened picture.
        mode: PIL's `L` or `RGB`.
    """
    from PIL import Image, ImageOps

    if image.getexif():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # `convert` would clip 16 bits at 255 instead of scaling them
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
