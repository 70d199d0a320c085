"""The VAE of models in latent space: which one it is, from pictures to latents and back."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.errors import DiffratioError, first_line

_FOLDER = "vae"  # where a pipeline keeps it


@dataclass(frozen=True)
class VaeId:
    """Which VAE made latents, and how they are scaled for the transformer: (mean - shift) * scale.

    Args:
        name: a folder or a hub id; where it was found, so that two that differ in it alone are equal.
        revision: of the weights, a hash of their values.
        channels: of a latent.
        factor: pixels of a picture's side for each of the latent's.
        scale: that latents are multiplied by.
        shift: that is taken from them before.
    """

    name: str = field(compare=False)
    revision: str
    channels: int
    factor: int
    scale: float
    shift: float

    def __post_init__(self) -> None:
        for key in ("name", "revision"):
            if not isinstance(getattr(self, key), str):
                raise DiffratioError(f"vae: {key} must be text, got {getattr(self, key)!r:.80}")
        for key in ("channels", "factor"):
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= 1 << 16:
                raise DiffratioError(f"vae: {key} must be an integer of 1 to 65536, got {value!r:.80}")
        for key in ("scale", "shift"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise DiffratioError(f"vae: {key} must be a finite number, got {value!r:.80}")

    def __str__(self) -> str:
        return (
            f"{self.name}@{self.revision} ({self.channels} channels, 1/{self.factor} of the side, "
            f"scale {self.scale:g}, shift {self.shift:g})"
        )


class LatentCoder:
    """A VAE that knows its scale.

    Args:
        vae: diffusers' `AutoencoderKL`.
        name: where it was found.

    Raises:
        DiffratioError: another kind of VAE, or one that scales every channel in its own way.
    """

    def __init__(self, vae: nn.Module, name: str) -> None:
        self.vae: Any = vae.eval().requires_grad_(False)
        self.id = identify(vae, name)

    def to(self, device: torch.device | str) -> LatentCoder:
        """Moves the VAE."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Means of the latents as the VAE gives them, neither scaled nor shifted.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, C, h, w) float32, on the VAE's device.
        """
        found = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        means: Tensor = found.mode()
        return means.float()

    def scaled(self, means: Tensor) -> Tensor:
        """What a transformer is trained on, of means (B, C, h, w)."""
        return (means - self.id.shift) * self.id.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Pictures of scaled latents.

        Args:
            latents: (n, C, h, w), as the transformer gives them.
            batch_size: decoded together.

        Returns:
            (n, 3, H, W) float32 in [-1, 1], on the device of `latents`.
        """
        parts = []
        for part in latents.split(batch_size):
            given = (part / self.id.scale + self.id.shift).to(self.vae.device, self.vae.dtype)
            parts.append(self.vae.decode(given, return_dict=False)[0].float().clamp(-1, 1).to(latents.device))
        return torch.cat(parts)


def identify(vae: nn.Module, name: str) -> VaeId:
    """Which VAE it is; raises DiffratioError where its latents take more than one scale and one shift."""
    config: Any = getattr(vae, "config", None)
    if config is None or "scaling_factor" not in config or "block_out_channels" not in config:
        raise DiffratioError(f"vae {name!r} is a {type(vae).__name__}; it must be an AutoencoderKL of diffusers")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise DiffratioError(f"vae {name!r} scales every channel in its own way (latents_mean), which is not supported")
    return VaeId(
        name,
        _digest(vae),
        int(config.latent_channels),
        2 ** (len(config.block_out_channels) - 1),
        float(config.scaling_factor),
        float(config.get("shift_factor") or 0.0),
    )


def load_vae(source: str | Path) -> LatentCoder:
    """Loads a VAE, float32, on the CPU.

    Args:
        source: its folder, the folder of a pipeline that has one, or the hub id of either.

    Raises:
        DiffratioError: there is none, it cannot be read, or it is of another kind.
    """
    from diffusers import AutoencoderKL

    name = str(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        places, options = [folder / _FOLDER if (folder / _FOLDER).is_dir() else folder], {"local_files_only": True}
        subfolders: list[str | None] = [None]
    else:
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise DiffratioError(
                f"vae {name!r} not found: no such folder; give the folder of a VAE or of a pipeline, or a hub id"
            )
        places, options, subfolders = [Path(name)], {}, [_FOLDER, None]
    problem: Exception = FileNotFoundError(f"{name}: no such folder")
    for subfolder in subfolders:
        try:
            loaded: Any = AutoencoderKL.from_pretrained(
                str(places[0]), subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True, **options
            )
            return LatentCoder(loaded, name)
        except DiffratioError:
            raise
        except Exception as error:  # damaged files of several formats raise anything
            problem = error
    raise DiffratioError(
        f"vae {name!r} cannot be loaded ({first_line(problem, 200)}); give the folder of a VAE or of a "
        "pipeline, or a hub id"
    )


def cast_(vae: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Sets the computing type of a VAE that was loaded as float32; `identify` knows it afterwards, in bfloat16 too."""
    if dtype == torch.bfloat16:
        vae._diffratio_digest = _digest(vae)  # type: ignore[assignment]
    return vae.to(dtype)


def _digest(vae: nn.Module) -> str:
    """Hash of the weights as float16: the same wherever they lie, in whatever file, loaded as float32 or float16."""
    noted = getattr(vae, "_diffratio_digest", None)
    if noted is not None and next(vae.parameters()).dtype == torch.bfloat16:  # which has too few digits
        return str(noted)
    digest = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        digest.update(f"{key}:{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()[:12]
