"""Many samples: every one is a function of (seed, index), alone or in a batch, in one process or several."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffratio.backbones import backbone_of
from diffratio.backbones.widening import image_channels, inpaints
from diffratio.errors import DiffratioError
from diffratio.files import atomic_file
from diffratio.inpainting import Known
from diffratio.sampling.processes import process_state as _processes
from diffratio.sampling.prompted import prompted

if TYPE_CHECKING:
    from PIL.Image import Image

_INITIAL, _STEPS = 0, 1


def sample_generator(seed: int, index: int, stream: int = _INITIAL) -> torch.Generator:
    """The CPU generator of one sample.

    torch's CPU generator is seeded by the low 32 bits alone. Hashed freely, about one seed in four would give some pair
    of 50,000 samples the same noise; here the index goes through a bijection, so a run's samples never share one.

    Args:
        seed: seed of the run.
        index: global index of the sample, at least 0.
        stream: 0 for the initial noise, 1 for the noise of the steps.

    Returns:
        A fresh generator.
    """
    return torch.Generator().manual_seed(_mix(seed, index, stream))


def _mix(seed: int, index: int, stream: int) -> int:
    offset = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=4).digest(), "little")
    x = (index + offset) & 0xFFFFFFFF
    # Murmur3's finaliser: bijective on 32 bits.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def initial_noise(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise to start from; each sample's depends on (seed, index) alone.

    Args:
        seed: seed of the run.
        indices: global indices of the B samples.
        shape: of one sample, (C, H, W).
        dtype: of the result; drawn in float32, so that precisions start from the same noise.
        device: of the result; drawn on the CPU, so that machines do too.

    Returns:
        (B, C, H, W).
    """
    draws = [torch.randn(tuple(shape), generator=sample_generator(seed, index)) for index in indices]
    noise = torch.stack(draws) if draws else torch.empty(0, *shape)
    return noise.to(device=device, dtype=dtype)


def balanced_labels(n: int, num_classes: int) -> list[int]:
    """Class i mod `num_classes` for sample i, n of them."""
    if num_classes < 1:
        raise DiffratioError(f"num_classes must be at least 1, got {num_classes}")
    return [i % num_classes for i in range(n)]


def in_turn(pipe: Any, n: int, start: int = 0) -> list[int | str]:
    """What samples start, ..., start + n - 1 are conditioned on where nothing else is asked for.

    Classes in turn, or the pipeline's own `asked`; of a text-conditional model the pipeline's own `prompts` in turn.

    Raises:
        DiffratioError: a text-conditional pipeline without prompts.
    """
    asked = getattr(pipe, "asked", ())
    if asked:
        return [asked[i % len(asked)] for i in range(start, start + n)]
    if backbone_of(pipe.transformer).condition == "class":
        return list(balanced_labels(start + n, pipe.transformer.config.num_embeds_ada_norm)[start:])
    prompts = getattr(pipe, "prompts", ())
    if not prompts:
        raise DiffratioError("a text-conditional model is sampled by prompts: give labels, n texts")
    return [prompts[i % len(prompts)] for i in range(start, start + n)]


def generate(
    pipe: Any,
    n: int,
    *,
    seed: int = 0,
    labels: Sequence[int | str] | None = None,
    batch_size: int = 64,
    steps: int = 20,
    guidance_scale: float = 2.0,
    start: int = 0,
    quiet: bool = False,
    distributed: bool = True,
    progress: Callable[[int], None] | None = None,
    known: Known | None = None,
) -> Tensor:
    """Samples n pictures in index order.

    In several processes (accelerate, torchrun) every process must call it: each samples its share, all get the result.

    Args:
        pipe: what `build_pipeline` returns, on its device.
        n: pictures.
        seed: seed of the run.
        labels: n class numbers or names, or n prompts; None takes what `in_turn` gives.
        batch_size: pictures sampled together in one process; changes results by rounding only.
        steps: evaluated steps.
        guidance_scale: classifier-free guidance; 1 or below evaluates the conditional half alone.
        start: global index of the first picture: (n=4, start=4) continues (n=4).
        quiet: shows no progress bar.
        distributed: False samples all n in this process, whatever others there are.
        progress: called after every batch with the number of pictures that this process has sampled since.
        known: n pictures and masks, of an inpainting model; None takes the pipeline's own `known` in turn.

    Returns:
        (n, C, H, W) float32 in [-1, 1], on the CPU.

    Raises:
        DiffratioError: a text-conditional model without prompts, numbers out of range, labels that are not n, a sampler
            whose noise cannot be reproduced, or an error in another process (every process raises, none waits).
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("start", start, 0)):
        if value < least:
            raise DiffratioError(f"{name} must be at least {least}, got {value}")
    if labels is None:
        labels = in_turn(pipe, n, start)
    if len(labels) != n:
        raise DiffratioError(f"{len(labels)} labels for n={n} samples: give one for each, or none for balanced classes")
    if known is not None and len(known) != n:
        raise DiffratioError(f"{len(known)} pictures to inpaint for n={n} samples: give one for each")
    if known is None and inpaints(pipe.transformer):
        known = _known_in_turn(pipe, n, start)
    state = _processes() if distributed else None
    if state is None:
        return _share(pipe, range(n), seed, labels, batch_size, steps, guidance_scale, start, quiet, progress, known)
    # Equal shares (the last places repeat sample n - 1), so that one plain gather returns them in index order.
    share = -(-n // state.num_processes)
    places = [min(i, n - 1) for i in range(state.process_index * share, (state.process_index + 1) * share)]
    quiet = quiet or not state.is_main_process
    from accelerate.utils import gather, gather_object

    mine, failure = None, None
    try:
        mine = _share(pipe, places, seed, labels, batch_size, steps, guidance_scale, start, quiet, progress, known)
    except Exception as error:  # whatever it is, the others must hear of it before they wait for this one's pictures
        failure = error
    said = None if failure is None else f"process {state.process_index}: {type(failure).__name__}: {failure}"
    problems = [problem for problem in gather_object([said]) if problem]
    if failure is not None:
        raise failure
    if problems or mine is None:
        raise DiffratioError(f"sampling failed in another process ({' '.join(problems[0].split())})")
    # a batch at a time: all pictures of all processes may be more than an accelerator holds
    parts = [gather(part.to(state.device)).cpu() for part in mine.split(batch_size)]
    return torch.cat([part.unflatten(0, (state.num_processes, -1)) for part in parts], dim=1).flatten(0, 1)[:n]


def _share(
    pipe: Any,
    places: Sequence[int],
    seed: int,
    labels: Sequence[int | str],
    batch_size: int,
    steps: int,
    guidance_scale: float,
    start: int,
    quiet: bool,
    report: Callable[[int], None] | None,
    known: Known | None,
) -> Tensor:
    from tqdm.auto import tqdm

    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    batches = []
    try:
        with tqdm(total=len(places), desc="sampling", unit="img", disable=quiet) as progress:
            for first in range(0, len(places), batch_size):
                batch = places[first : first + batch_size]
                chosen = [labels[i] for i in batch]
                shown = {} if known is None else _arguments(known.take(batch))
                images = _batch(pipe, seed, [start + i for i in batch], chosen, steps, guidance_scale, shown)
                batches.append(images.float().cpu() * 2 - 1)
                progress.update(len(batch))
                if report is not None:
                    report(len(batch))
    finally:
        pipe.set_progress_bar_config(**bar)
    return torch.cat(batches)


def _known_in_turn(pipe: Any, n: int, start: int) -> Known:
    if getattr(pipe, "known", None) is None:
        raise DiffratioError("an inpainting model fills holes in pictures: give known, n pictures with their masks")
    kept: Known = pipe.known
    return kept.take(range(start, start + n))


def _arguments(known: Known) -> dict[str, Tensor]:
    return {"image": known.images, "mask": known.masks}


def _batch(
    pipe: Any,
    seed: int,
    indices: Sequence[int],
    labels: Sequence[int | str],
    steps: int,
    guidance_scale: float,
    shown: dict[str, Tensor],
) -> Tensor:
    """Pictures (B, C, H, W) in [0, 1]."""
    common = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "output_type": "pt"}
    side, channels = backbone_of(pipe.transformer).sample_side(pipe.transformer), image_channels(pipe.transformer)
    if hasattr(pipe, "vae") and hasattr(pipe, "text_encoder"):
        noise = initial_noise(seed, indices, (channels, side, side))
        generators = [sample_generator(seed, index, _STEPS) for index in indices]
        return prompted(pipe, labels, noise, generators, steps, guidance_scale)
    if not hasattr(pipe, "vae"):
        noise = initial_noise(seed, indices, (channels, side, side))
        generators = [sample_generator(seed, index, _STEPS) for index in indices]
        return pipe(list(labels), latents=noise, generator=generators, **shown, **common).images
    if _draws_noise(pipe.scheduler):
        raise DiffratioError(
            f"{type(pipe.scheduler).__name__} draws noise at each step, and diffusers' DiTPipeline draws it from the "
            "global generator, so that samples would depend on their batch: choose sampler ddim or dpm_solver"
        )
    from diffratio.sampling.pipeline import label_ids

    # It takes no latents, but draws them sample by sample from these: the same as initial_noise in float32.
    numbers = label_ids(labels, pipe.labels, int(pipe.transformer.config.num_embeds_ada_norm))
    return pipe(numbers, generator=[sample_generator(seed, index) for index in indices], **common).images


def _draws_noise(scheduler: Any) -> bool:
    from diffusers import DDPMScheduler

    return isinstance(scheduler, DDPMScheduler) or "sde" in str(scheduler.config.get("algorithm_type"))


def _to_uint8(images: Tensor) -> Tensor:
    """(n, C, H, W) in [-1, 1] -> (n, H, W, C) uint8 on the CPU."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise DiffratioError(f"images of shape {tuple(images.shape)}: expected (n, 1 or 3, H, W) with n at least 1")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def sample_grid(images: Tensor, columns: int, scale: int = 3) -> Image:
    """One picture of many, row by row.

    Args:
        images: (n, C, H, W) in [-1, 1], C = 1 or 3.
        columns: pictures in a row; the number of classes puts each class of `balanced_labels` into one column.
        scale: how often each pixel is repeated in both directions.

    Returns:
        A PIL picture, with white lines of `scale` pixels between.
    """
    from PIL import Image as pil

    if columns < 1 or scale < 1:
        raise DiffratioError(f"columns and scale must be at least 1, got {columns} and {scale}")
    pixels = _to_uint8(images)
    n, height, width, channels = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = picture
    canvas = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return pil.fromarray(canvas.squeeze(2).numpy() if channels == 1 else canvas.numpy())


def save_npz(path: str | Path, images: Tensor, labels: Sequence[int] | None = None) -> None:
    """Writes pictures as the ADM evaluation suite reads them, whole or not at all.

    Args:
        path: the `.npz` file: `arr_0` uint8 (n, H, W, C), and `arr_1` int64 (n,) where there are labels.
        images: (n, C, H, W) in [-1, 1], C = 1 or 3.
        labels: n class numbers.
    """
    import numpy as np

    arrays = [_to_uint8(images).numpy()]
    if labels is not None:
        if len(labels) != len(images):
            raise DiffratioError(f"{len(labels)} labels for {len(images)} pictures: give one for each, or none")
        arrays.append(np.asarray(labels, dtype=np.int64))
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, *arrays)
