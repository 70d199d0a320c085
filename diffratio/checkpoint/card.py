"""The card of a checkpoint: what it is, on which data it was made, how it is sampled and how good it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffratio.conditions import EncoderId
from diffratio.errors import DiffratioError, unknown
from diffratio.files import read_json
from diffratio.inpainting.settings import InpaintSettings

FORMAT, VERSION = "diffratio-card", 1
KINDS = ("dense", "routed")
OBJECTIVES = ("flow", "flow_sample", "noise")


@dataclass(frozen=True)
class SamplerSettings:
    """How a checkpoint is sampled unless the caller says otherwise.

    Args:
        name: sampler, as in `sampling.schedulers`.
        steps: evaluated steps.
        guidance_scale: classifier-free guidance; 1 or below is none.
    """

    name: str = "flow_euler"
    steps: int = 20
    guidance_scale: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DiffratioError(f"card: sampler.name must be a name, got {self.name!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise DiffratioError(f"card: sampler.steps must be an integer of at least 1, got {self.steps!r}")
        if type(self.guidance_scale) not in (int, float):
            raise DiffratioError(f"card: sampler.guidance_scale must be a number, got {self.guidance_scale!r}")


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint; `card.json` holds it, README.md shows it.

    Args:
        name: short name.
        kind: `dense` or `routed`.
        backbone: family of the transformer.
        objective: what it predicts, `flow`, `flow_sample` or `noise`.
        sampler: how it is sampled by default.
        class_names: one name a class, in the order of the labels; empty where there are none.
        text: encoder of its captions, where the checkpoint holds none of its own; None without text.
        inpaint: what it was trained on, where it fills holes; None where it sees the noised picture alone.
        data: what it was trained on.
        training: steps, batch size, learning rate, time ...; plain data.
        metrics: measured quality and cost; plain data.
        licence: of the weights.
        reproduce: the command that makes it.
    """

    name: str
    kind: str = "dense"
    backbone: str = "dit"
    objective: str = "flow"
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    class_names: tuple[str, ...] = ()
    text: EncoderId | None = None
    inpaint: InpaintSettings | None = None
    data: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "Apache-2.0"
    reproduce: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "backbone", "data", "licence", "reproduce"):
            if not isinstance(getattr(self, key), str):
                raise DiffratioError(f"card: {key} must be text, got {getattr(self, key)!r}")
        if not self.name:
            raise DiffratioError("card: name is empty; give the checkpoint a name")
        if self.kind not in KINDS:
            raise unknown("card kind", self.kind, KINDS)
        if self.objective not in OBJECTIVES:
            raise unknown("card objective", self.objective, OBJECTIVES)
        if isinstance(self.class_names, str) or not all(isinstance(name, str) for name in self.class_names):
            raise DiffratioError(f"card: class_names must be a list of names, got {self.class_names!r}")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        for key in ("training", "metrics"):
            value = getattr(self, key)
            try:
                if not isinstance(value, Mapping):
                    raise TypeError("not a mapping")
                json.dumps(dict(value), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise DiffratioError(f"card: {key} must be plain finite data, got {value!r} ({error})") from None

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class names by class number, or None."""
        return dict(enumerate(self.class_names)) or None

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        values = dataclasses.asdict(self) | {"class_names": list(self.class_names)}
        if self.text is not None:
            values["text"] = self.text.to_json()
        if self.inpaint is None:
            del values["inpaint"]
        else:
            values["inpaint"] |= {"share": list(self.inpaint.share)}
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_json(cls, document: Any) -> Card:
        """Reads a card; keys that are left out take their defaults.

        Raises:
            DiffratioError: not a card, one of a newer version, an unknown key or a value out of place.
        """
        if not isinstance(document, Mapping):
            raise DiffratioError(f"card: expected an object, got {type(document).__name__}")
        values = dict(document)
        if values.pop("format", FORMAT) != FORMAT:
            raise DiffratioError(f"card: format {document['format']!r} is not {FORMAT!r}")
        if values.pop("version", VERSION) != VERSION:
            raise DiffratioError(
                f"card: version {document['version']!r} is not {VERSION}, the one this release reads; upgrade diffratio"
            )
        known = [one.name for one in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("key of the card", key, known)
        if "name" not in values:
            raise DiffratioError("card: name is missing")
        sampler = values.get("sampler", {})
        if isinstance(sampler, Mapping):
            settings = [one.name for one in dataclasses.fields(SamplerSettings)]
            for key in sampler:
                if key not in settings:
                    raise unknown("key of the card's sampler", key, settings)
            values["sampler"] = SamplerSettings(**sampler)
        elif not isinstance(sampler, SamplerSettings):
            raise DiffratioError(f"card: sampler must be an object, got {sampler!r}")
        text = values.get("text")
        if isinstance(text, Mapping):
            try:
                values["text"] = EncoderId(**text)
            except (TypeError, DiffratioError) as error:
                raise DiffratioError(f"card: text must be name, revision, tokens, width, pooled; {error}") from None
        elif text is not None and not isinstance(text, EncoderId):
            raise DiffratioError(f"card: text must be an object, got {text!r}")
        holes = values.get("inpaint")
        if isinstance(holes, Mapping):
            try:
                values["inpaint"] = InpaintSettings(**holes)
            except (TypeError, DiffratioError) as error:
                raise DiffratioError(f"card: inpaint does not describe masks ({error})") from None
        elif holes is not None and not isinstance(holes, InpaintSettings):
            raise DiffratioError(f"card: inpaint must be an object, got {holes!r}")
        names = values.get("class_names")
        if isinstance(names, list):
            values["class_names"] = tuple(names)
        elif names is not None and not isinstance(names, tuple):
            raise DiffratioError(f"card: class_names must be a list of names, got {names!r}")
        return cls(**values)


def read_card(folder: str | Path) -> Card:
    """The card of a checkpoint folder.

    Raises:
        DiffratioError: there is none, or it is not valid; names the file.
    """
    path = Path(folder) / "card.json"
    try:
        return Card.from_json(read_json(path, "model card"))
    except DiffratioError as error:
        raise error if str(path) in str(error) else DiffratioError(f"{str(path)!r}: {error}") from None
