"""class_accuracy: whether samples still obey their condition, by a linear probe on the features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.evaluation.evidence import Evidence
from diffratio.evaluation.statistics import Estimate, feature_sets, share_estimate
from diffratio.files import atomic_file

FORMAT = "diffratio-probe-1"
FOLDER = Path(__file__).parent.parent / "probes"
_REQUIRED = ("extractor", "data", "n", "n_held_out", "accuracy", "made_by")


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features: class = argmax(weight x + bias).

    Args:
        weight: (classes, d).
        bias: (classes,).
        extractor: id of the features that it reads.
        data: name of the data set whose classes it knows.
        n: training images.
        n_held_out: held-out images that `accuracy` rests on.
        accuracy: share of held-out images that it gets right, as stored (float16).
        made_by: the command that made it.
    """

    weight: Tensor
    bias: Tensor
    extractor: str
    data: str
    n: int
    n_held_out: int
    accuracy: float
    made_by: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """Features (n, d) -> classes (n,) int64."""
        weight, bias = self.weight.to(features), self.bias.to(features)
        return (features @ weight.T + bias).argmax(dim=1)


@dataclass(frozen=True)
class Accuracy(Estimate):
    """Share of samples that the probe assigns to their condition, with a Wilson interval.

    Args:
        real: the same share for held-out real images: what perfect samples would reach.
        chance: 1 / number of classes.
    """

    real: float
    chance: float


def class_accuracy(features: Tensor, labels: Tensor, probe: Probe, *, extractor: str | None = None) -> Accuracy:
    """Share of generated samples that a probe assigns to the class they were generated for.

    Args:
        features: features of the samples (n, d).
        labels: their conditions (n,), integers in [0, classes).
        probe: the classifier.
        extractor: id of the features, checked against the probe's where it is given.

    Returns:
        Share in [0, 1], higher is better, with its Wilson 95 % interval.

    Raises:
        DiffratioError: features of another extractor or width, or labels that the probe does not know.

    Source:
        Ravuri and Vinyals, "Classification Accuracy Score" (2019) trains on samples; this is its reverse, with a
        classifier trained on real images. Interval: Wilson (1927).
    """
    if extractor is not None and extractor != probe.extractor:
        raise DiffratioError(
            f"class_accuracy: the probe reads {probe.extractor!r} features, got {extractor!r}; extract those, or train "
            "a probe with python -m diffratio.evaluation.metrics.train_probe"
        )
    (features,) = feature_sets("class_accuracy", 2, samples=features)
    if features.shape[1] != probe.weight.shape[1]:
        raise DiffratioError(
            f"class_accuracy: the probe reads features of width {probe.weight.shape[1]}, got {features.shape[1]}"
        )
    if labels.shape != features.shape[:1]:
        raise DiffratioError(
            f"class_accuracy needs a label for each of {len(features)} samples, got shape {tuple(labels.shape)}"
        )
    if not _knows(probe, labels):
        raise DiffratioError(
            f"class_accuracy: the probe of {probe.data!r} knows classes 0 to {probe.classes - 1}, got labels from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    right = probe.predict(features) == labels.to(features.device)
    share = share_estimate(int(right.sum()), len(right))
    return Accuracy(**asdict(share), real=probe.accuracy, chance=1 / probe.classes)


def find_probe(data: str, extractor: str, folder: str | Path = FOLDER) -> Probe:
    """The shipped probe for a data set's classes on an extractor's features.

    Raises:
        DiffratioError: none ships for this pair; names those that do.
    """
    probes = _shipped(Path(folder))
    for probe in probes:
        if (probe.data, probe.extractor) == (data, extractor):
            return probe
    known = "; ".join(f"{probe.data} on {probe.extractor}" for probe in probes) or "none"
    raise DiffratioError(
        f"no probe for data set {data!r} on features {extractor!r}; there is: {known}. Train one with "
        "python -m diffratio.evaluation.metrics.train_probe"
    )


def applicable_accuracy(evidence: Evidence) -> Accuracy | None:
    """`class_accuracy` where a shipped probe fits; None without labels, or with other data, features or classes."""
    if evidence.labels is None or evidence.data is None or evidence.extractor is None:
        return None
    for probe in _shipped(FOLDER):
        if (probe.data, probe.extractor) == (evidence.data, evidence.extractor) and _knows(probe, evidence.labels):
            return class_accuracy(evidence.features, evidence.labels, probe)
    return None


def save_probe(probe: Probe, path: str | Path) -> None:
    """Writes a probe as safetensors: float16 tensors, everything else as metadata."""
    from safetensors.torch import save_file

    tensors = {"weight": probe.weight.half().contiguous(), "bias": probe.bias.half().contiguous()}
    metadata = {"format": FORMAT} | {name: str(getattr(probe, name)) for name in _REQUIRED}
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def load_probe(path: str | Path) -> Probe:
    """Reads what `save_probe` wrote.

    Raises:
        DiffratioError: no such file, not a probe, or a broken one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            found = file.metadata() or {}
            weight, bias = file.get_tensor("weight").float(), file.get_tensor("bias").float()
    except (SafetensorError, OSError) as error:
        raise DiffratioError(f"probe {str(path)!r} cannot be read ({error}); reinstall or train it anew") from None
    missing = [name for name in _REQUIRED if name not in found]
    if found.get("format") != FORMAT or missing:
        raise DiffratioError(
            f"probe {str(path)!r} has format {found.get('format')!r}"
            + (f" without {', '.join(missing)}" if missing else "")
            + f", this version reads {FORMAT!r}; train it anew"
        )
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise DiffratioError(
            f"probe {str(path)!r} holds weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, not (classes, d) "
            "and (classes,); train it anew"
        )
    return Probe(
        weight,
        bias,
        extractor=found["extractor"],
        data=found["data"],
        n=int(found["n"]),
        n_held_out=int(found["n_held_out"]),
        accuracy=float(found["accuracy"]),
        made_by=found["made_by"],
    )


@lru_cache(maxsize=4)
def _shipped(folder: Path) -> tuple[Probe, ...]:
    return tuple(load_probe(path) for path in sorted(folder.glob("*.safetensors")))


def _knows(probe: Probe, labels: Tensor) -> bool:
    if torch.is_floating_point(labels) or not len(labels):
        return False
    return int(labels.min()) >= 0 and int(labels.max()) < probe.classes
