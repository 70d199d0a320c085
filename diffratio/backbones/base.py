"""The backbone contract and its registry."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from diffratio.catalog import FAMILIES as _FAMILIES
from diffratio.cost.macs import Description
from diffratio.cost.run import Guidance, Halves, SamplingRun
from diffratio.errors import DiffratioError, unknown
from diffratio.tokens.grid import TokenGrid

TIMESTEPS = 1000  # of the timestep input of diffusers' transformers that take one of 0..1000
TEXT_TOKENS = "_text_tokens"  # notes in a configuration, integers from 1
TOKEN_SIDE = "_token_side"
NOTES = (TEXT_TOKENS, TOKEN_SIDE)
_REGISTERED: dict[str, Backbone] = {}
B = TypeVar("B", bound="type[Backbone]")


def notes_in(config: Mapping[str, Any]) -> dict[str, int]:
    """The notes of a configuration from a file; what is no integer from 1 is none."""
    return {note: config[note] for note in NOTES if type(config.get(note)) is int and config[note] > 0}


class Backbone(ABC):
    """Everything that the rest of the package knows about a transformer family.

    Attributes:
        name: registered name.
        hidden: name of the block argument that carries the image tokens.
        per_token: names of block arguments with one entry an image token.
        per_sample: names of block arguments with one entry a sample.
        sites: site name -> attribute path of the submodule inside a block; see `site_modules`.
        streams: names of the block arguments that a block returns, in the order in which it returns them: `hidden`
            alone, or `hidden` and the text tokens of joint attention, which are never reduced.
        batched: names of the transformer's own arguments with one entry a sample.
        refused: names of the transformer's own arguments, or `argument.entry` of a dictionary among them, that do not
            go with a method, and why.
        condition: what a sample is conditioned on, a `class` label or `text` embeddings.
        pipeline: diffusers' class of the family's usual pipeline, of text-conditional families.
        guidance_order: how the family's pipelines batch the guidance halves; `one` where there are none.
        positions: name of the argument of blocks and attention modules that holds positions of all text tokens and
            after them all image tokens, tensors (T + N, D). The attention modules of such a family may be given text
            and image tokens in one, text first. None where there is no such argument.
        attention: name of the block argument, a dictionary, whose entries reach the processors that
            `index_attention_` puts in; None where the family has none.
        root_blocks: blocks whose submodules the transformer's own forward calls too: sharding leaves them in its unit.
        fold: side of the square of a sample's pixels that `predict` folds into one position with more channels before
            the transformer sees it; 1 leaves samples as they are.
        objectives: what such transformers can be trained to predict.
    """

    name: ClassVar[str]
    hidden: ClassVar[str] = "hidden_states"
    per_token: ClassVar[tuple[str, ...]] = ()
    per_sample: ClassVar[tuple[str, ...]] = ()
    sites: ClassVar[Mapping[str, str]] = {}
    streams: ClassVar[tuple[str, ...]] = ("hidden_states",)
    batched: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep")
    refused: ClassVar[Mapping[str, str]] = {}
    condition: ClassVar[Literal["class", "text"]] = "class"
    pipeline: ClassVar[str] = ""
    guidance_order: ClassVar[Halves] = "cond_first"
    positions: ClassVar[str | None] = None
    attention: ClassVar[str | None] = None
    root_blocks: ClassVar[tuple[int, ...]] = ()
    fold: ClassVar[int] = 1
    objectives: ClassVar[tuple[str, ...]] = ("flow", "flow_sample", "noise")

    @abstractmethod
    def matches(self, transformer: nn.Module) -> bool:
        """Whether the transformer belongs to this family."""

    @abstractmethod
    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """The blocks in order."""

    @abstractmethod
    def grid(self, transformer: nn.Module, sample: Tensor | None = None) -> TokenGrid:
        """Token grid of a sample (B, C, H, W), or of the configured size."""

    def grid_of(
        self, transformer: nn.Module, arguments: Mapping[str, Any], known: TokenGrid | None = None
    ) -> TokenGrid:
        """Token grid of a forward.

        Args:
            transformer: dense or converted.
            arguments: of the forward, by name.
            known: grid of the open run, from its second step on: where finding it out would make the device wait, this
                one is taken if its number of tokens fits.
        """
        return self.grid(transformer, arguments["hidden_states"])

    @abstractmethod
    def noise_level(self, timestep: Tensor) -> Tensor:
        """The family's timestep input -> noise level u in [0, 1], same shape."""

    @abstractmethod
    def timestep(self, noise_level: Tensor) -> Tensor:
        """Inverse of `noise_level`."""

    def scheduler_level(self, timesteps: Tensor) -> Tensor:
        """Timesteps of a scheduler -> noise levels; the default is that pipelines hand them on as they are."""
        return self.noise_level(timesteps)

    def model_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps of a scheduler -> the family's timestep input; the default is that they are the same."""
        return timesteps

    def level_shift(self, transformer: nn.Module) -> float:
        """Shift of a flow scheduler that gives the noise levels of `default_run`; 1 spreads them evenly."""
        return 1.0

    @abstractmethod
    def sample_side(self, transformer: nn.Module) -> int:
        """Height and width of a sample of the configured size."""

    def packed(self, sample: Tensor) -> Tensor:
        """A sample (B, C, H, W) as the family's usual pipeline takes latents."""
        return sample

    def unpacked(self, packed: Tensor, grid: TokenGrid) -> Tensor:
        """Inverse of `packed`, for a token grid."""
        return packed

    def scale_input(self, transformer: nn.Module, scale: float, batch: int) -> dict[str, Tensor]:
        """The argument that tells the transformer the guidance scale; empty where guidance is two halves."""
        return {}

    def predict(self, transformer: nn.Module, inputs: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """The transformer's output.

        Args:
            transformer: dense or converted.
            inputs: (B, C, H, W).
            timestep: the family's timestep input (B,).
            condition: the arguments that a condition stands for, with one entry a sample.

        Returns:
            (B, C or 2C, H, W).
        """
        output = transformer(inputs, timestep=timestep, **condition, return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output

    @abstractmethod
    def per_token_output(self, transformer: nn.Module, output: Tensor) -> Tensor:
        """Prediction (B, C, H, W) -> (B, N, c) by token, without learned variance."""

    @abstractmethod
    def describe(self, transformer: nn.Module) -> Description:
        """Analytic costs of everything that the forward computes."""

    @abstractmethod
    def tiny(self, **changes: Any) -> nn.Module:
        """A small random transformer of this family, for tests; a few keyword changes of its configuration."""

    @abstractmethod
    def load(self, source: str, **options: Any) -> nn.Module:
        """From a local folder in diffusers layout (also a pipeline folder) or a hub id."""

    @abstractmethod
    def from_config(self, config: Mapping[str, Any]) -> nn.Module:
        """A randomly initialised transformer of a diffusers configuration."""

    def site_modules(self, block: nn.Module, site: str) -> list[nn.Module]:
        """The submodules of a block that a site stands for."""
        return [block.get_submodule(self.sites[site])]

    def prepare_(self, transformer: nn.Module) -> dict[str, Any]:
        """Switches off what would disturb training; returns what `undo_` needs to restore it."""
        return {}

    def undo_(self, transformer: nn.Module, prepared: dict[str, Any]) -> None:  # noqa: B027 (nothing to undo)
        """Restores what `prepare_` changed."""

    def index_attention_(self, transformer: nn.Module) -> Any:
        """Puts this family's own attention processor into every block; returns what `plain_attention_` needs.

        It takes `query_index`, `key_index` and `key_bias` on top of the stock one's arguments, and equals it without.

        Raises:
            DiffratioError: the family has none, or the model's processors are not the stock ones.
        """
        raise DiffratioError(f"backbone {self.name} cannot choose queries and keys separately")

    def plain_attention_(self, transformer: nn.Module, processors: Any) -> None:
        """Puts the processors back that `index_attention_` replaced."""
        raise NotImplementedError

    def patch_embedding(self, transformer: nn.Module) -> nn.Conv2d:
        """The convolution that makes tokens of a sample.

        Raises:
            DiffratioError: the family has none.
        """
        raise DiffratioError(f"backbone {self.name} makes tokens without a convolution: it cannot see more channels")

    def null_label(self, transformer: nn.Module) -> int | None:
        """Class label that means "no condition", where the family is class-conditional."""
        return None

    def text_tokens(self, transformer: nn.Module) -> int:
        """Text tokens of one sample in the default run: what was set, or what the family's pipelines use."""
        return self.known_text_tokens(transformer)

    def known_text_tokens(self, transformer: nn.Module) -> int:
        """What was noted by `set_text_tokens_`; 0 where nothing was."""
        return int(transformer.config.get(TEXT_TOKENS, 0))  # type: ignore[union-attr, operator]

    def longest_prompt(self, transformer: nn.Module) -> int:
        """What the family's pipeline takes as `max_sequence_length` for `text_tokens`."""
        return self.text_tokens(transformer)

    def text_width(self, transformer: nn.Module) -> int:
        """Channels of a text token's state.

        Raises:
            DiffratioError: the family reads no text.
        """
        raise DiffratioError(f"backbone {self.name} reads no text; it is conditioned on {self.condition}")

    def pooled_width(self, transformer: nn.Module) -> int:
        """Channels of the state that stands for a whole text beside its tokens'; 0 where the family reads none."""
        return 0

    def set_text_tokens_(self, transformer: nn.Module, tokens: int) -> None:
        """Notes in the configuration how many text tokens a sample has; diffusers ignores and keeps the note."""
        transformer.register_to_config(**{TEXT_TOKENS: tokens})  # type: ignore[operator]

    def example(
        self, transformer: nn.Module, batch: int, seed: int = 0, run: SamplingRun | None = None
    ) -> dict[str, Any]:
        """Arguments of a forward on random noise, but for the timestep: something to time, on the model's own device.

        Args:
            transformer: dense or converted.
            batch: samples.
            seed: of the noise.
            run: whose token grid and text tokens; None takes those of the default run.
        """
        raise DiffratioError(f"backbone {self.name} cannot be timed yet: it gives no example input")

    def default_run(self, transformer: nn.Module, steps: int, guidance: Guidance = "cfg") -> SamplingRun:
        """The run that `steps=` stands for: levels 1, 1 - 1/S, ..., 1/S on the configured grid."""
        from diffratio.cost.run import uniform_run

        return uniform_run(steps, self.grid(transformer), guidance, self.text_tokens(transformer))


class FromDiffusers(Backbone):
    """A family that is one transformer class of diffusers.

    Attributes:
        transformer_class: diffusers' class.
    """

    transformer_class: ClassVar[Any]

    def matches(self, transformer: nn.Module) -> bool:
        """Whether it is diffusers' class, converted in place or not."""
        return isinstance(transformer, self.transformer_class)

    def load(self, source: str, **options: Any) -> nn.Module:
        """A transformer folder, a pipeline folder, or a hub id."""
        return from_pretrained(self.transformer_class, source, **options)

    def from_config(self, config: Mapping[str, Any]) -> nn.Module:
        """Random weights."""
        transformer: Any = self.transformer_class.from_config(dict(config))
        return transformer


class Patched(FromDiffusers):
    """Blocks in `transformer_blocks`, timesteps of 0..1000, samples and predictions (B, C, H, W) in whole patches."""

    def grid(self, transformer: nn.Module, sample: Tensor | None = None) -> TokenGrid:
        """Any height and width; raises DiffratioError where they are not whole patches."""
        config: Any = transformer.config
        patch = config.patch_size
        height, width = (config.sample_size,) * 2 if sample is None else sample.shape[-2:]
        if height % patch or width % patch:
            raise DiffratioError(
                f"a {height}x{width} sample does not fit this {self.name}: it takes whole {patch}x{patch} patches; "
                "choose a height and width of the picture that are multiples of "
                f"{patch} times the VAE's scale factor"
            )
        return TokenGrid(height // patch, width // patch)

    def sample_side(self, transformer: nn.Module) -> int:
        """`sample_size` of the configuration."""
        config: Any = transformer.config
        return int(config.sample_size)

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """`transformer_blocks`."""
        blocks = transformer.transformer_blocks
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def noise_level(self, timestep: Tensor) -> Tensor:
        """u = t / 1000, whatever the objective."""
        return timestep.float() / TIMESTEPS

    def timestep(self, noise_level: Tensor) -> Tensor:
        """t = 1000 u, a float."""
        return noise_level * TIMESTEPS

    def per_token_output(self, transformer: nn.Module, output: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C * patch^2), C the channels of the pictures."""
        from diffratio.backbones.widening import image_channels  # it looks families up here

        config: Any = transformer.config
        return patches(output[:, : image_channels(transformer)], config.patch_size)

    def patch_embedding(self, transformer: nn.Module) -> nn.Conv2d:
        """That of `pos_embed`."""
        found = transformer.pos_embed.proj  # type: ignore[union-attr]
        assert isinstance(found, nn.Conv2d)
        return found


def check_classes(transformer: nn.Module, what: str) -> None:
    """Raises DiffratioError where a transformer takes no class labels and `what` gives it nothing else."""
    backbone = backbone_of(transformer)
    if backbone.condition != "class":
        raise DiffratioError(
            f"{what} takes class-conditional transformers, and {backbone.name} is conditioned on {backbone.condition}; "
            "sample it with its own pipeline: diffratio.load_pipeline(folder)(prompts), diffratio.attach_(pipe)"
        )


def modulate_visibly_(norms: Iterable[nn.Module]) -> None:
    """Draws adaptive norms anew: diffusers makes them tiny, and tests need blocks that visibly change tokens."""
    for norm in norms:
        linear: Any = norm.linear
        nn.init.normal_(linear.weight, std=0.3)
        nn.init.normal_(linear.bias, std=0.3)


def patches(sample: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C patch^2), one row a patch, in raster order."""
    return nn.functional.unfold(sample, patch, stride=patch).transpose(1, 2)


def from_pretrained(transformer_class: Any, source: str, **options: Any) -> nn.Module:
    """A diffusers transformer from its own folder, a pipeline folder that holds `transformer/`, or a hub id.

    Args:
        transformer_class: diffusers' class.
        source: folder or hub id.
        **options: of diffusers' `from_pretrained`.
    """
    folder = Path(source)
    if not folder.is_dir():
        loaded = transformer_class.from_pretrained(source, subfolder="transformer", **options)
    else:
        if not (folder / "config.json").is_file() and (folder / "transformer").is_dir():
            options["subfolder"] = "transformer"
        loaded = transformer_class.from_pretrained(folder, local_files_only=True, **options)
    return loaded  # type: ignore[no-any-return]


def register(backbone: B) -> B:
    """Class decorator: makes a family known under its name."""
    _REGISTERED[backbone.name] = backbone()
    return backbone


def backbones() -> dict[str, str]:
    """Registered names with one line each; imports nothing heavy."""
    return {name: line for name, (_, _, line) in _FAMILIES.items()}


def get_backbone(name: str) -> Backbone:
    """The family of that name.

    Raises:
        DiffratioError: there is none; the nearest names are given.
    """
    if name not in _FAMILIES:
        raise unknown("backbone", name, _FAMILIES)
    importlib.import_module(_FAMILIES[name][0])
    return _REGISTERED[name]


def backbone_of_class(class_name: str) -> Backbone:
    """The family whose diffusers transformer class has that name."""
    for name, (_, known, _) in _FAMILIES.items():
        if known == class_name:
            return get_backbone(name)
    raise unknown("transformer class", class_name, [known for _, known, _ in _FAMILIES.values()])


def backbone_of(transformer: nn.Module) -> Backbone:
    """The family a transformer belongs to.

    Raises:
        DiffratioError: none matches; names the module class and its children.
    """
    for name in _FAMILIES:
        backbone = get_backbone(name)
        if backbone.matches(transformer):
            return backbone
    children = ", ".join(sorted({type(child).__name__ for child in transformer.children()})) or "no submodules"
    raise DiffratioError(
        f"no backbone matches {type(transformer).__name__} (holding {children}); "
        f"known transformers are {', '.join(known for _, known, _ in _FAMILIES.values())}; "
        "give the pipeline's transformer itself, not the pipeline or a wrapper"
    )
