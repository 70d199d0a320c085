"""The verb `sample`: what was asked for, checked against the checkpoint, and the pictures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio.errors import DiffratioError, shortened
from diffratio.files import atomic_file, writable_folder

COLUMNS = 10
_MOST = 1_000_000  # pictures


def sampled(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Samples pictures from a checkpoint into a PNG grid; what was done as plain data, and in a sentence."""
    out, npz = Path(args.out), Path(args.npz) if args.npz else None
    if out.suffix != ".png":
        raise DiffratioError(f"--out {args.out!r}: pictures are written as PNG, give a name that ends in .png")
    for path in (out, npz):
        if path is not None:
            writable_folder(path.parent)
    if args.labels is not None and args.prompts is not None:
        raise DiffratioError("--labels asks for classes and --prompts for texts; a model takes one of the two")
    labels = _labels(args.labels) if args.prompts is None else _prompts(args.prompts)
    n = args.n if args.n is not None else 40 if args.prompts is None else len(labels or ())
    for name, value, least, most in (
        ("--n", n, 1, _MOST),
        ("--batch-size", args.batch_size, 1, _MOST),
        ("--steps", 1 if args.steps is None else args.steps, 1, _MOST),
        ("--seed", args.seed, 0, (1 << 63) - 1),
    ):
        if not least <= value <= most:
            raise DiffratioError(f"{name} must be at least {least} and at most {most}, got {shortened(value)}")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise DiffratioError(f"--guidance must be a finite number, got {args.guidance}")

    import torch

    from diffratio.checkpoint import SamplerSettings, load_pipeline, read_card, resolve
    from diffratio.sampling.generate import generate, sample_grid, save_npz
    from diffratio.sampling.known import triples
    from diffratio.sampling.processes import usable_device

    place = resolve(args.folder)
    has_card = isinstance(place, Path) and (place / "card.json").is_file()
    card = read_card(place) if has_card else None  # type: ignore[arg-type]
    defaults = card.sampler if card is not None else SamplerSettings()
    steps = defaults.steps if args.steps is None else args.steps
    guidance = defaults.guidance_scale if args.guidance is None else args.guidance
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(place, device=usable_device(device, f"--device {device!r}"), parts=args.parts)
    shown = _held_out(pipe, args, card, n)
    if shown is not None and labels is None:
        labels = list(shown.captions) or None
    _fits(pipe, args, labels)
    known = _known(pipe, args, None if card is None else card.inpaint, n, shown)
    chosen = None if labels is None else [labels[i % len(labels)] for i in range(n)]
    images = generate(
        pipe,
        n,
        seed=args.seed,
        labels=chosen,
        batch_size=args.batch_size,
        steps=steps,
        guidance_scale=guidance,
        quiet=args.json,
        known=known,
    )
    turn = len(labels or ())
    columns = turn if 1 < turn <= COLUMNS and n > turn else COLUMNS  # a column a prompt
    grid = sample_grid(images, columns) if known is None else sample_grid(triples(known, images), 9)
    with atomic_file(out) as temporary:
        grid.save(temporary, format="PNG")
    if npz is not None:
        save_npz(npz, images)
    document = {
        "checkpoint": str(place),
        "n": n,
        "seed": args.seed,
        "steps": steps,
        "guidance": guidance,
        "device": device,
        "out": str(out),
        "npz": str(npz) if npz else None,
    }
    return document, f"{n} samples in {steps} steps: {out}" + (f" and {npz}" if npz else "")


def _prompts(given: Sequence[str]) -> list[int | str]:
    """Prompts as they stand, or those of a text file, one a line."""
    if len(given) == 1 and given[0].endswith(".txt"):
        try:
            given = Path(given[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DiffratioError(
                f"--prompts {given[0]!r} cannot be read ({error}); give texts, or a .txt file"
            ) from None
    prompts: list[int | str] = [line.strip() for line in given if line.strip()]
    if not prompts:
        raise DiffratioError("--prompts holds no text; give texts in quotes, or a .txt file with one a line")
    return prompts


@dataclass(frozen=True)
class _HeldOut:
    """Held-out pictures of the set that a model was trained on, and their captions where it has any."""

    pictures: list[Any]
    captions: list[str]


def _held_out(pipe: Any, args: argparse.Namespace, card: Any, n: int) -> _HeldOut | None:
    """What an inpainting model fills where no picture is given, if it was trained on an embedded set."""
    from diffratio.backbones.widening import image_channels, inpaints

    if args.image is not None or card is None or not inpaints(pipe.transformer):
        return None
    import numpy as np
    from PIL import Image

    from diffratio.data import embedded_sets
    from diffratio.data.columns import captions_of, undecoded
    from diffratio.data.decode import decode
    from diffratio.data.source import open_source

    if card.data not in embedded_sets():
        return None
    tables = open_source(card.data)
    split = "validation" if "validation" in tables else "test"
    table = undecoded(tables[split], split, "image")
    rows = [i * len(table) // n if n <= len(table) else i % len(table) for i in range(n)]
    size, channels = pipe.transformer.config.sample_size, image_channels(pipe.transformer)
    decoded = [decode(table[row]["image"], size=size, channels=channels, pad=True) for row in rows]
    pictures = [Image.fromarray(np.squeeze(one.transpose(1, 2, 0))) for one in decoded]
    captions: list[str] = []
    if card.text is not None and "caption" in table.column_names:
        every = captions_of(table, split, "caption")
        captions = [every[row] for row in rows]
    return _HeldOut(pictures, captions)


def _fits(pipe: Any, args: argparse.Namespace, labels: Sequence[int | str] | None) -> None:
    """Raises DiffratioError where a model is asked for by what it is not conditioned on."""
    from diffratio.backbones import backbone_of

    wanted, name = backbone_of(pipe.transformer).condition, str(args.folder)
    if wanted == "text" and (labels is None or args.labels is not None):
        raise DiffratioError(f"{name!r} is sampled by text: --prompts 'a text' 'another', or --prompts FILE.txt")
    if wanted == "class" and args.prompts is not None:
        raise DiffratioError(f"{name!r} is sampled by class, not by text: --labels 0,3,5, or nothing for all in turn")


def _known(pipe: Any, args: argparse.Namespace, settings: Any, n: int, shown: _HeldOut | None) -> Any:
    """The pictures and masks that an inpainting model fills, n of each; None for other models."""
    from diffratio.backbones.widening import inpaints
    from diffratio.inpainting import InpaintSettings, Masks
    from diffratio.sampling.known import known_of, read_pictures

    if not inpaints(pipe.transformer):
        if args.image is not None or args.mask is not None:
            raise DiffratioError(
                f"{args.folder!r} is no inpainting model: leave --image and --mask out, or train one (inpaint=default)"
            )
        return None
    if args.image is None and shown is None:
        raise DiffratioError(f"{args.folder!r} fills holes in pictures: --image FILE.png, and --mask FILE.png or boxes")
    pictures = shown.pictures if shown is not None else read_pictures(args.image)
    side = pipe.transformer.config.sample_size
    for name, picture in zip(args.image or (), pictures, strict=False):
        if picture.size != (side, side):
            width, height = picture.size
            raise DiffratioError(
                f"picture {name!r} is {height}x{width}, and {args.folder!r} fills {side}x{side}: crop and scale it"
            )
    pictures = [pictures[i % len(pictures)] for i in range(n)]
    mask = args.mask or (settings or InpaintSettings()).mask
    share = (settings or InpaintSettings()).share
    masks = Masks(InpaintSettings(mask, share), side, args.seed)
    return known_of(pipe.transformer, pictures, masks.fixed(range(n)), n)


def _labels(text: str | None) -> list[int | str] | None:
    if text is None:
        return None
    labels = [part.strip() for part in text.split(",")]
    if not all(labels):
        raise DiffratioError(f"--labels {text!r} holds an empty name; give class names or numbers such as 0,3,5")
    return [int(label) if label.isdecimal() else label for label in labels]
