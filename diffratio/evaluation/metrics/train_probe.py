"""Trains the probe that `class_accuracy` ships: python -m diffratio.evaluation.metrics.train_probe

Multinomial logistic regression on the features of the embedded training part, its weight decay chosen on a fifth of it;
the held-out part is used once, for the accuracy that the file states.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.features import FeatureExtractor, Lite0Features
from diffratio.evaluation.metrics.probe import FOLDER, Probe, save_probe
from diffratio.evaluation.reference import cached_features

DECAYS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_COMMAND = "python -m diffratio.evaluation.metrics.train_probe"


def fit(features: Tensor, labels: Tensor, classes: int, decay: float, *, steps: int = 300) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardised features, by L-BFGS in float64.

    Args:
        features: (n, d).
        labels: (n,) int64.
        classes: number of classes.
        decay: weight of half the squared norm of the weights; higher shrinks more.
        steps: most L-BFGS iterations.

    Returns:
        Weight (classes, d) and bias (classes,) for features as they are, float64.
    """
    x = features.double()
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp_min(1e-3)  # a feature that is 0 in every image stays 0
    x = (x - mean) / scale
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    folded = weight.detach() / scale
    return folded, bias.detach() - folded @ mean


def train_probe(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], extractor: FeatureExtractor, data: str, made_by: str
) -> Probe:
    """Fits a probe and measures it, as it is stored, on held-out images.

    Args:
        train: images (n, C, H, W) in [-1, 1] and labels (n,).
        held_out: the same, of images that the probe does not see.
        extractor: its features.
        data: name of the data set.
        made_by: the command that does this again.

    Returns:
        The probe, its tensors rounded to float16.
    """
    (images, labels), (other_images, other_labels) = train, held_out
    features, classes = cached_features(images, extractor, data), int(labels.max()) + 1
    chosen = torch.arange(len(labels)) % 5 == 0  # rows are shuffled

    def share(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
        return float(((x.double() @ weight.T + bias).argmax(dim=1) == y).double().mean())

    scores = {
        decay: share(*fit(features[~chosen], labels[~chosen], classes, decay), features[chosen], labels[chosen])
        for decay in DECAYS
    }
    decay = max(scores, key=lambda one: scores[one])
    print("; ".join(f"decay {one:g}: {score:.4f}" for one, score in scores.items()), file=sys.stderr, flush=True)
    weight, bias = (part.half().float() for part in fit(features, labels, classes, decay))
    other = cached_features(other_images, extractor, data)
    accuracy = share(weight.double(), bias.double(), other, other_labels)
    return Probe(weight, bias, extractor.id, data, len(labels), len(other_labels), accuracy, made_by)


def read_images(file: Path, n: int, size: int) -> tuple[Tensor, Tensor]:
    """n pictures of a parquet file with the columns `image` (bytes) and `label`, drawn with a fixed seed.

    Args:
        file: the parquet file.
        n: how many; all where there are fewer.
        size: side in pixels; smaller pictures are centred on black.

    Returns:
        Images (n, C, size, size) in [-1, 1] and labels (n,) int64.

    Raises:
        DiffratioError: no such file, other columns, or pictures larger than `size`.
    """
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    if not file.is_file():
        raise DiffratioError(f"train_probe: no file {str(file)!r}; give a parquet file with columns image and label")
    table = parquet.read_table(file)
    if not {"image", "label"} <= set(table.column_names):
        raise DiffratioError(
            f"train_probe: {str(file)!r} has the columns {', '.join(table.column_names)}, it needs image and label"
        )
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:n]
    table = table.take(order.numpy())
    pictures = []
    for record in table["image"].to_pylist():
        with Image.open(io.BytesIO(record["bytes"])) as opened:
            pixels = torch.from_numpy(np.array(opened))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        height, width = pixels.shape[1:]
        if max(height, width) > size:
            raise DiffratioError(f"train_probe: a picture of {width}x{height} does not fit into --size {size}")
        top, left = (size - height) // 2, (size - width) // 2
        edges = (left, size - width - left, top, size - height - top)
        pictures.append(torch.nn.functional.pad(pixels, edges))
    return torch.stack(pictures) / 127.5 - 1, torch.tensor(table["label"].to_pylist())


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a probe and writes it among those that ship, or elsewhere."""
    embedded = Path(str(files("diffratio") / "data" / "fashion_mnist"))
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Trains the linear probe of class_accuracy.")
    parser.add_argument("--data", default="fashion_mnist", help="name of the data set in the file's header")
    parser.add_argument("--train", type=Path, default=embedded / "train.parquet", metavar="FILE.parquet")
    parser.add_argument("--held-out", type=Path, default=embedded / "test.parquet", metavar="FILE.parquet")
    parser.add_argument("--n", type=int, default=8000, help="training images")
    parser.add_argument("--n-held-out", type=int, default=5000)
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels, as the model makes them")
    parser.add_argument("--resize", type=int, default=96, help="side that the extractor resizes to")
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors", help="default: among those that ship")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    try:
        extractor = Lite0Features(args.resize)
        probe = train_probe(
            read_images(args.train, args.n, args.size),
            read_images(args.held_out, args.n_held_out, args.size),
            extractor,
            args.data,
            f"{_COMMAND} --data {args.data} --n {args.n} --size {args.size} --resize {args.resize}",
        )
        out = args.out or FOLDER / f"{args.data}-{extractor.id.replace('@', '-')}.safetensors"
        save_probe(probe, out)
    except DiffratioError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{out}: {probe.n} images, held-out accuracy {probe.accuracy:.4f} on {probe.n_held_out}")


if __name__ == "__main__":
    main()
