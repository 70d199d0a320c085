"""Loads transformers and pipelines; a routed folder is checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffratio.backbones import backbone_of, get_backbone
from diffratio.backbones.base import Backbone, backbone_of_class, notes_in
from diffratio.checkpoint import layout
from diffratio.checkpoint.adapter import base_place, load_adapter
from diffratio.checkpoint.bounds import check_shapes, check_sizes
from diffratio.checkpoint.card import read_card
from diffratio.checkpoint.parts import is_text, pipeline_around, scheduler_of
from diffratio.checkpoint.save import ROUTING_FORMAT, ROUTING_VERSION, as_dtype, differences, is_router, public
from diffratio.checkpoint.stored import stored_method
from diffratio.checkpoint.weights import INDEX_SUFFIX, check_values, read_shards, read_weights
from diffratio.conditions import EncoderId
from diffratio.conditions.index import read_index
from diffratio.conditions.pipelines import pipeline_text
from diffratio.errors import DiffratioError, first_line
from diffratio.files import read_json, sha256
from diffratio.methods.base import MethodConfig
from diffratio.surgery import apply_, attach_, is_applied

# norm_type of a diffusers Transformer2DModel -> the class that it has become
_OLDER = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def load_transformer(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    base: str | Path | None = None,
    merge: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """A transformer in evaluation mode, with its routing applied where the checkpoint is routed.

    Args:
        source: a checkpoint folder (dense, routed, or an adapter on another one), the name of one that ships, a bare
            diffusers transformer folder, or a hub id such as facebook/DiT-XL-2-256.
        dtype: computing type; routers stay float32. None is float32 on the CPU and with an adapter, elsewhere what is
            stored.
        device: where it goes.
        base: of an adapter, where the weights that it stands on are now; None takes what it names.
        merge: of an adapter, whether it is added to the weights; otherwise its layers stay.
        revision: commit, branch or tag of a hub id; None is the newest.

    Raises:
        DiffratioError: no such checkpoint, a damaged file, missing or unexpected keys, wrong shapes, a keep schedule
            that does not fit, or another base than an adapter's own; names the file.
    """
    wanted, place = as_dtype(dtype), resolve_folder(source)
    adapter = isinstance(place, Path) and layout.is_adapter(place)
    if base is not None and not adapter:
        raise DiffratioError(f"base={str(base)!r} is for adapter folders, and {str(source)!r} is none; leave it out")
    if wanted is None and torch.device(device).type == "cpu":
        wanted = torch.float32
    with torch.random.fork_rng(devices=[]):  # random initialisation must not move the caller's generator
        if isinstance(place, str):
            transformer = _from_hub(place, revision)
        elif adapter:
            transformer = load_adapter(place, wanted, base, merge)
        else:
            transformer = _from_folder(place, wanted)
    if isinstance(place, str) and wanted is not None:
        nn.Module.to(transformer, wanted)
    return nn.Module.to(transformer, device).eval()


def load_skeleton(source: str | Path) -> nn.Module:
    """The dense transformer of a checkpoint on the meta device: its configuration is read, its weights are not.

    Raises:
        DiffratioError: no such checkpoint or configuration, or a routed one.
    """
    place = resolve_folder(source)
    if isinstance(place, Path):
        if layout.checkpoint_kind(place) == "routed":
            raise DiffratioError(f"{str(place)!r} is a routed checkpoint; a dense one is needed here")
        if layout.is_adapter(place):
            return load_skeleton(base_place(place))
        folder = place if layout.checkpoint_kind(place) == "transformer" else place / layout.TRANSFORMER
        path, config = folder / "config.json", _mapping(folder / "config.json", "transformer configuration")
    else:
        path, config = Path(place), _hub_config(place)
    with torch.device("meta"):
        return _build(_family(config, path), config, path)


def text_of(source: str | Path) -> EncoderId | None:
    """The text encoder that a checkpoint's card names; None where there is no card, or no text in it."""
    place = resolve_folder(source)
    if isinstance(place, str) or not (place / layout.CARD).is_file():
        return None
    return read_card(place).text


def load_pipeline(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    parts: Any = None,
    base: str | Path | None = None,
) -> Any:
    """A diffusers pipeline with the checkpoint's transformer, scheduler and class names, attached where it is routed.

    A text-conditional one is the class that `model_index.json` names, with its text encoders, tokenizers and VAE.

    Args:
        source: a checkpoint folder (dense, routed or an adapter; with `vae/`, of an adapter its base's, it samples in
            latent space), the name of one that ships, or a hub id.
        dtype: computing type, as for `load_transformer`.
        device: where it goes.
        parts: of a text-conditional checkpoint that was exported without them: the folder or hub id of the dense
            pipeline whose text encoders, tokenizers and VAE are taken, or such a pipeline, which then shares them; an
            adapter takes those of its base.
        base: of an adapter, where the weights that it stands on are now; None takes what it names.

    Raises:
        DiffratioError: as `load_transformer`, or there is no scheduler, or a part of the pipeline is missing.
    """
    from diffratio.sampling.pipeline import build_pipeline

    place = resolve_folder(source)
    if isinstance(place, str):
        place = _download(place)
    if layout.checkpoint_kind(place) == "transformer":
        raise DiffratioError(
            f"{str(place)!r} holds a transformer alone, no {layout.SCHEDULER}/: load_transformer it, then "
            "sampling.pipeline.build_pipeline(transformer, make_scheduler(...))"
        )
    scheduler = scheduler_of(place)
    transformer = load_transformer(place, dtype, device, base)
    text = text_of(place)
    if text is not None:
        pipe = build_pipeline(transformer, scheduler, text=text)
        return attach_(pipe) if is_applied(transformer) else pipe
    own: Any = base_place(place, base) if layout.is_adapter(place) else place
    while isinstance(own, Path) and layout.is_adapter(own):  # where the parts beside the transformer are
        own = base_place(own)
    if is_text(transformer):
        others = parts if parts is not None else own
        others = resolve_folder(others) if isinstance(others, str | Path) else others
        others = _download(others) if isinstance(others, str) else others
        if isinstance(others, Path):
            _note_text(transformer, others)
        pipe = pipeline_around(transformer, place, others, device)
        return attach_(pipe) if is_applied(transformer) else pipe
    if parts is not None:
        raise DiffratioError(f"parts={str(parts)!r}: a class-conditional pipeline has no other parts; leave it out")
    own = _download(own) if isinstance(own, str) else own
    vae = _vae(own, next(transformer.parameters()).dtype) if (own / layout.VAE).is_dir() else None
    if vae is not None:
        vae = vae.to(device)
    pipe = build_pipeline(transformer, scheduler, vae, id2label=_names(place))
    return attach_(pipe) if is_applied(transformer) else pipe


def _note_text(transformer: nn.Module, pipeline: Path) -> None:
    """Notes how many text tokens a pipeline pads prompts to, where nothing is noted yet."""
    backbone, made = backbone_of(transformer), pipeline_text(pipeline)
    if made is not None and made.tokens and not backbone.known_text_tokens(transformer):
        backbone.set_text_tokens_(transformer, made.tokens)


def resolve_folder(source: str | Path) -> Path | str:
    """`layout.resolve`, with the kind of a folder checked."""
    place = layout.resolve(source)
    if isinstance(place, Path):
        layout.checkpoint_kind(place)
    return place


def _from_folder(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    kind = layout.checkpoint_kind(folder)
    place = folder if kind == "transformer" else folder / layout.TRANSFORMER
    config = _mapping(place / "config.json", "transformer configuration")
    if kind == "routed":
        return _routed(folder, config, dtype)
    weights, name = place / layout.DENSE_WEIGHTS, str(config.get("_class_name"))
    if name.startswith("Routed") or (place / layout.ROUTED_WEIGHTS).is_file():
        raise DiffratioError(
            f"{str(folder)!r} is the transformer of a routed checkpoint without its {layout.ROUTING}; "
            "give the checkpoint folder itself"
        )
    backbone = _family(config, place / "config.json")
    index = place / f"{layout.DENSE_WEIGHTS}{INDEX_SUFFIX}"
    if not weights.is_file() and not index.is_file():  # another file format
        return _of_other_format(backbone, place, config, dtype)
    state = read_weights(weights) if weights.is_file() else read_shards(index)
    transformer = _build_for(state, weights, backbone, config, place / "config.json")
    return _fill(transformer, state, weights, dtype)


def _routed(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """Dense model first, then the method, then the weights: nothing stays uninitialised."""
    path = folder / layout.ROUTING
    document = _mapping(path, "routing")
    method, weights, digest = _routing(document, path, folder)
    state = read_weights(weights)
    if sha256(weights) != digest:
        raise DiffratioError(f"{str(weights)!r} is damaged or was changed: its sha256 is not the one in {str(path)!r}")
    backbone = get_backbone(document["backbone"])
    transformer = _build_for(state, weights, backbone, config, folder / layout.TRANSFORMER / "config.json")
    if document["class"] != type(transformer).__name__:
        raise DiffratioError(f"{str(path)!r}: class {document['class']!r} is not that of backbone {backbone.name!r}")
    try:
        apply_(transformer, method)
    except Exception as error:  # of values that stand together in no checkpoint of ours
        raise DiffratioError(f"{str(path)!r}: {first_line(error)}") from None
    return _fill(transformer, state, weights, dtype)


def _routing(document: Mapping[str, Any], path: Path, folder: Path) -> tuple[MethodConfig, Path, str]:
    """Method, weights file and digest of a routing.json."""
    if document.get("format") != ROUTING_FORMAT or document.get("version") != ROUTING_VERSION:
        raise DiffratioError(
            f"{str(path)!r} is {document.get('format')!r} version {document.get('version')!r}; this release reads "
            f"{ROUTING_FORMAT!r} version {ROUTING_VERSION}"
        )
    try:
        file, digest = document["weights"]["file"], document["weights"]["sha256"]
        if not isinstance(document["backbone"], str) or not isinstance(document["class"], str):
            raise TypeError("backbone and class must be text")
        if not isinstance(file, str) or Path(file).name != file or not isinstance(digest, str):
            raise TypeError(f"weights.file {file!r} must be the name of a file in {layout.TRANSFORMER}/")
        config = stored_method(document["method"])
    except (KeyError, TypeError, DiffratioError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DiffratioError(f"{str(path)!r}: {reason}") from None
    if not config.method.learned:
        raise DiffratioError(f"{str(path)!r}: method {config.method.name!r} has no parameters and needs no checkpoint")
    if config.method.name == "diffcr" and getattr(config, "schedule", None) is None:
        raise DiffratioError(f"{str(path)!r}: method.schedule is missing; export again from a finished run")
    return config, folder / layout.TRANSFORMER / file, digest


def _mapping(path: Path, what: str) -> dict[str, Any]:
    document = read_json(path, what, finite=False)
    if not isinstance(document, dict):
        raise DiffratioError(f"{what}: {str(path)!r} holds {type(document).__name__}, not an object")
    return document


def _family(config: Mapping[str, Any], path: Path) -> Backbone:
    """The backbone of a diffusers configuration."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":  # checkpoints older than a class of the family's own
        name = _OLDER.get(str(config.get("norm_type")), name)
    try:
        return backbone_of_class(str(name))
    except DiffratioError as error:
        raise DiffratioError(f"{str(path)!r}: {error}") from None


def _build_for(
    state: Mapping[str, Tensor], weights: Path, backbone: Backbone, config: Mapping[str, Any], path: Path
) -> nn.Module:
    """The model of a configuration, once it is known that the weights are about as many as it asks for."""
    held = sum(value.numel() for value in state.values())
    with torch.device("meta"):
        check_shapes(_build(backbone, config, path), held, path, weights)
    return _build(backbone, config, path)


def _of_other_format(
    backbone: Backbone, place: Path, config: Mapping[str, Any], dtype: torch.dtype | None
) -> nn.Module:
    """Weights that diffusers finds by itself; a pickle among them is read as tensors alone (`weights_only`)."""
    files = [one for one in place.iterdir() if one.is_file() and one.suffix in (".bin", ".safetensors")]
    if not files:
        raise DiffratioError(
            f"{str(place)!r} cannot be loaded: {layout.DENSE_WEIGHTS} is missing; copy the whole folder"
        )
    with torch.device("meta"):  # a number takes a byte at least
        held = sum(one.stat().st_size for one in files)
        check_shapes(_build(backbone, config, place / "config.json"), held, place / "config.json", place)
    return _by_diffusers(backbone, str(place), dtype)


def _build(backbone: Backbone, config: Mapping[str, Any], path: Path) -> nn.Module:
    check_sizes(config, path)
    try:
        transformer = backbone.from_config(public(config))
        transformer.register_to_config(**notes_in(config))  # type: ignore[operator]
        return transformer
    except Exception as error:  # what constructors raise on values that nobody gave them before
        raise DiffratioError(f"{str(path)!r} does not describe a {backbone.name}: {first_line(error)}") from None


def _fill(transformer: nn.Module, state: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> nn.Module:
    """Puts the stored values in, all of them and nothing else."""
    expected = transformer.state_dict()
    if set(expected) != set(state):
        hint = ""
        if any(map(is_router, set(state) ^ set(expected))):
            hint = "; routers are part of a routed checkpoint and of no dense one: dense and routed files are mixed up"
        raise DiffratioError(f"weights {str(path)!r} do not fit: {differences(state, expected)}{hint}")
    wrong = [key for key, value in expected.items() if value.shape != state[key].shape]
    if wrong:
        key = wrong[0]
        raise DiffratioError(
            f"weights {str(path)!r} do not fit: {key} has shape {tuple(state[key].shape)} and the configuration asks "
            f"for {tuple(expected[key].shape)} ({len(wrong)} such keys)"
        )
    check_values(expected, state, path)
    if dtype is None:
        dtype = next(value.dtype for key, value in state.items() if value.is_floating_point() and not is_router(key))
    nn.Module.to(transformer, dtype)  # diffusers' own would warn of modules that it keeps in float32
    for name, module in transformer.named_modules():
        if name.endswith(".router"):
            module.float()
    transformer.load_state_dict(state, strict=True)
    return transformer


def _by_diffusers(
    backbone: Backbone, source: str, dtype: torch.dtype | None = None, revision: str | None = None
) -> nn.Module:
    """Through from_pretrained, whose silent re-initialisation of missing keys is an error here."""
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    options |= {} if revision is None else {"revision": revision}
    try:
        loaded: Any = backbone.load(source, output_loading_info=True, **options)
    except Exception as error:  # damaged files of several formats raise anything
        raise DiffratioError(f"checkpoint {source!r} cannot be loaded: {first_line(error)}") from None
    transformer, info = loaded
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        what = " and ".join(f"{len(keys)} {kind.replace('_', ' ')} ({keys[0]} ...)" for kind, keys in wrong.items())
        raise DiffratioError(f"weights of {source!r} do not fit their configuration: {what}")
    assert isinstance(transformer, nn.Module)
    values = transformer.state_dict()
    check_values(values, values, Path(source))
    return transformer


def _from_hub(name: str, revision: str | None = None) -> nn.Module:
    config = _hub_config(name, revision)
    check_sizes(config, Path(name))
    return _by_diffusers(_family(config, Path(name)), name, revision=revision)


def _hub_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """Configuration of the transformer of a pipeline on the hub."""
    from diffusers import AutoModel

    try:
        return dict(AutoModel.load_config(name, subfolder=layout.TRANSFORMER, revision=revision))
    except (OSError, ValueError) as error:
        raise DiffratioError(
            f"checkpoint {name!r} is no folder here and cannot be had from the hub: {first_line(error)}"
        ) from None


def _download(name: str) -> Path:
    """Local copy of a pipeline on the hub."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DiffratioError(
            f"checkpoint {name!r} is no folder here and cannot be had from the hub: {first_line(error)}"
        ) from None


def _vae(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    from diffratio.sampling.vae import cast_

    try:
        loaded = AutoencoderKL.from_pretrained(folder / layout.VAE, local_files_only=True, torch_dtype=torch.float32)
    except Exception as error:  # as of transformers
        raise DiffratioError(f"{str(folder / layout.VAE)!r} cannot be loaded: {first_line(error)}") from None
    return cast_(loaded.eval(), dtype)


def _names(folder: Path) -> dict[int, str] | None:
    """Class names from the card, or from a pipeline that diffusers saved."""
    if (folder / layout.CARD).is_file():
        return read_card(folder).id2label
    index = folder / layout.INDEX
    names = read_index(index).get("id2label") if index.is_file() else None
    if not isinstance(names, Mapping):
        return None
    if not all(key.isdecimal() and len(key) < 10 and isinstance(name, str) for key, name in names.items()):
        raise DiffratioError(f"{str(index)!r}: id2label must give numbers of classes their names")
    return {int(key): name for key, name in names.items()}
