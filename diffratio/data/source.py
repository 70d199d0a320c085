"""Where images come from: an embedded set, a folder, parquet, or the Hugging Face hub, opened as named splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio.data.registry import embedded_folder, embedded_sets
from diffratio.errors import DiffratioError, kind_and_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def open_source(source: str) -> dict[str, Dataset]:
    """Opens a source without decoding any image.

    Args:
        source: name of an embedded set (it wins over a folder of that name: write `./name` for the folder), a folder of
            images (class = sub-folder, optionally inside `train/` and `test/`), a parquet file, a folder of parquet
            files (split from the file name), or a hub id `owner/name`.

    Returns:
        The splits by name.

    Raises:
        DiffratioError: nothing found there, or it cannot be read or reached.
    """
    if source in embedded_sets():
        return _embedded(source)
    path = Path(source).expanduser()
    if path.exists():
        return _local(path)
    names = ", ".join(embedded_sets())
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix == ".parquet"
    if looks_like_a_path:
        raise DiffratioError(
            f"data source {source!r} not found: no such folder or file, and not an embedded set ({names}); "
            "give an existing folder or parquet file, an embedded name, or a hub id owner/name"
        )
    return _hub(source, names)


def open_stream(source: str) -> dict[str, IterableDataset]:
    """Opens a source to be read from the front, as it comes: nothing of it is copied to this machine.

    Args:
        source: a parquet file, a folder of parquet files or of images, or a hub id; see `open_source`.

    Returns:
        The splits by name.

    Raises:
        DiffratioError: nothing found there, it cannot be read or reached, or it is an embedded set.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    if source in embedded_sets():
        raise DiffratioError(f"data source {source!r} is embedded and in memory; leave streaming=true out")
    options: dict[str, Any] = {}
    kind = source
    if path.is_file():
        kind, options = "parquet", {"data_files": {"train": str(path)}}
    elif path.is_dir():
        parquet = any(file.stem != "metadata" for file in path.rglob("*.parquet"))
        kind, options = ("parquet" if parquet else "imagefolder"), {"data_dir": str(path)}
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise DiffratioError(f"data source {source!r} not found: no such folder or file; give one, or a hub id")
    try:
        loaded: Any = load_dataset(kind, streaming=True, **options)
    except Exception as error:  # the reader's many error types all mean: this cannot be read
        raise DiffratioError(f"data source {source!r} cannot be streamed ({kind_and_line(error, 200)})") from error
    return {str(name): split for name, split in loaded.items()}


def local_root(source: str) -> Path | None:
    """The folder that a source's files lie in; None for an embedded or a hub set."""
    path = Path(source).expanduser()
    if source in embedded_sets() or not path.exists():
        return None
    return path if path.is_dir() else path.parent


def _embedded(name: str) -> dict[str, Dataset]:
    import pyarrow.parquet as parquet
    from datasets import Dataset

    # Read straight into memory: `load_dataset` would write a copy into the user's cache folder.
    return {file.stem: Dataset(parquet.read_table(file)) for file in sorted(embedded_folder(name).glob("*.parquet"))}


def _local(path: Path) -> dict[str, Dataset]:
    from datasets import load_dataset

    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise DiffratioError(f"data source {str(path)!r} is not a .parquet file; give one or a folder")
            return _splits(load_dataset("parquet", data_files={"train": str(path)}))
        if any(file.stem != "metadata" for file in path.rglob("*.parquet")):  # that one describes a folder of images
            return _splits(load_dataset("parquet", data_dir=str(path)))
        if any(file.suffix.lower() in _IMAGE_SUFFIXES for file in path.rglob("*")):
            return _splits(load_dataset("imagefolder", data_dir=str(path)))
    except DiffratioError:
        raise
    except Exception as error:  # the reader's many error types all mean: these files cannot be read
        if "corresponds to no data" in str(error):
            raise DiffratioError(
                f"a split of data source {str(path)!r} is empty ({kind_and_line(error, 200)}); "
                "add rows to its file or remove it"
            ) from error
        raise DiffratioError(
            f"data source {str(path)!r} cannot be read ({kind_and_line(error, 200)}); mend or remove the file it names"
        ) from error
    raise DiffratioError(
        f"data source {str(path)!r} holds no parquet and no image files; put images into one sub-folder per class"
    )


def _hub(source: str, names: str) -> dict[str, Dataset]:
    from datasets import load_dataset

    try:
        return _splits(load_dataset(source))
    except Exception as error:  # no network, no such set, no right to read it: each library layer has its own type
        raise DiffratioError(
            f"data source {source!r} not found: no such folder, not an embedded set ({names}), and the Hugging Face "
            f"hub gave no such data set ({kind_and_line(error, 200)}); connect to the network and check the id "
            "(a gated set needs a login), or download it elsewhere and give the path of its folder"
        ) from error


def _splits(loaded: Mapping[str, Dataset]) -> dict[str, Dataset]:
    return {str(name): split for name, split in loaded.items()}
