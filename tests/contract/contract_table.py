"""Every method on every tiny backbone: the rows that the contract is tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

import diffratio
from diffratio.backbones import backbone_of, get_backbone
from diffratio.backbones.flux import image_ids
from diffratio.cost.run import Halves, SamplingRun, uniform_run
from diffratio.methods import MethodConfig
from diffratio.methods.fixed import TRAINING_FREE
from diffratio.routing.schedule import KeepSchedule
from diffratio.surgery import attachment, is_applied
from diffratio.tokens.grid import TokenGrid

GRID = TokenGrid(4, 4)
RUN = uniform_run(8, GRID)
BYPASSING = ((10, 3, 0, 5), (4, 10, 2, 0), (0, 1, 10, 8))
MIXED = ((10, 3, 7, 5), (4, 10, 2, 9), (6, 1, 10, 8))
LEVELS = (0.05, 0.3, 0.55, 0.8, 0.95)  # regions 0, 1, 2, 3, 3 of four


@dataclass(frozen=True)
class Row:
    """One method with settings under which it reduces tokens, and settings under which it must change nothing.

    Args:
        name: of the row.
        method: registered name.
        config: builds the config that is tested.
        neutral: builds the config that must give the dense model, bit for bit.
        ratios: whether keep ratios are learned.
        trains: whether its own parameters learn.
        halves: which guidance halves the batches of these tests hold, for methods that work on them.
        whole_run: whether only the run shows what the method does, not a single forward.
    """

    name: str
    method: str
    config: Callable[[], MethodConfig]
    neutral: Callable[[], MethodConfig]
    ratios: bool = False
    trains: bool = False
    halves: Halves | None = None
    whole_run: bool = False


def _schedule(bins: tuple[tuple[int, ...], ...], alignment: int = 1) -> KeepSchedule:
    return KeepSchedule(bins, RUN, 0.9, alignment)


def _tome(name: str, **settings: Any) -> Row:
    return Row(name, "tome", lambda: diffratio.ToMe(ratio=0.5, **settings), lambda: diffratio.ToMe(0.0, **settings))


def _tofu(name: str, **settings: Any) -> Row:
    return Row(name, "tofu", lambda: diffratio.ToFu(ratio=0.5, **settings), lambda: diffratio.ToFu(0.0, **settings))


def _sdtm(name: str, **settings: Any) -> Row:
    return Row(name, "sdtm", lambda: diffratio.SDTM(**settings), lambda: diffratio.SDTM(0.0, 0.0, **settings))


def _importance(name: str, **settings: Any) -> Row:
    make = diffratio.Importance
    return Row(name, "importance", lambda: make(**settings), lambda: make(**settings | {"ratio": 0.0}))


def _dato(name: str, whole_run: bool = False, **settings: Any) -> Row:
    make, neutral = diffratio.DaTo, settings | {"every": 1.0, "ratio": 0.0}
    return Row(name, "dato", lambda: make(**settings), lambda: make(**neutral), whole_run=whole_run)


def _block_cache(name: str, **settings: Any) -> Row:
    make = diffratio.BlockCache
    return Row(name, "block_cache", lambda: make(**settings), lambda: make(every=1.0), whole_run=True)


def _external(name: str, **settings: Any) -> Row:
    make, off = diffratio.ExternalCache, {"interval": 1} if "interval" in settings else {"threshold": 0.0}
    return Row(name, "external_cache", lambda: make(**settings), lambda: make(**settings | off), whole_run=True)


BOTH = ("self_attention", "feed_forward")
ROWS = [
    Row("dense", "dense", diffratio.Dense, diffratio.Dense),
    Row("mod", "mod", lambda: diffratio.MoD(keep=0.55), lambda: diffratio.MoD(keep=1.0), trains=True),
    Row("hand", "hand", lambda: diffratio.Hand(keep=0.4), lambda: diffratio.Hand(keep=1.0), trains=True),
    Row(
        "measured",
        "measured",
        lambda: diffratio.Measured(_schedule(BYPASSING)),
        lambda: diffratio.Measured(_schedule(((10,) * 4,) * 3)),
        trains=True,
    ),
    *(
        Row(
            f"measured {ranking}",
            "measured",
            lambda ranking=ranking: diffratio.Measured(_schedule(MIXED), ranking),
            lambda ranking=ranking: diffratio.Measured(_schedule(((10,) * 4,) * 3), ranking),
        )
        for ranking in TRAINING_FREE
    ),
    Row("block_drop", "block_drop", lambda: diffratio.BlockDrop(blocks=(1,)), diffratio.BlockDrop),
    Row("random_keep", "random_keep", lambda: diffratio.RandomKeep(keep=0.55), diffratio.RandomKeep),
    Row(
        "diffcr schedule",
        "diffcr",
        lambda: diffratio.DiffCR(_schedule(MIXED)),
        lambda: diffratio.DiffCR(_schedule(((10,) * 4,) * 3)),
        trains=True,
    ),
    Row(
        "diffcr aligned",
        "diffcr",
        lambda: diffratio.DiffCR(_schedule(MIXED, 4)),
        lambda: diffratio.DiffCR(_schedule(((9,) * 4,) * 3, 16)),
        trains=True,
    ),
    Row("diffcr learning", "diffcr", diffratio.DiffCR, diffratio.DiffCR, ratios=True, trains=True),
    Row(
        "diffcr learning, one region, loop",
        "diffcr",
        lambda: diffratio.DiffCR(regions=1, estimator="loop"),
        lambda: diffratio.DiffCR(regions=1, estimator="loop"),
        ratios=True,
        trains=True,
    ),
    Row(
        "diffcr learning, soft",
        "diffcr",
        lambda: diffratio.DiffCR(estimator="soft"),
        lambda: diffratio.DiffCR(estimator="soft"),
        ratios=True,
        trains=True,
    ),
    Row("fewer_steps", "fewer_steps", lambda: diffratio.FewerSteps(0.5), diffratio.FewerSteps, whole_run=True),
    Row(
        "guidance_interval",
        "guidance_interval",
        lambda: diffratio.GuidanceInterval(skip=0.5),
        diffratio.GuidanceInterval,
        halves="cond",
        whole_run=True,
    ),
    Row(
        "lite_uncond",
        "lite_uncond",
        lambda: diffratio.LiteUncond(keep=0.45),
        diffratio.LiteUncond,
        halves="uncond",
    ),
    Row("todo", "todo", lambda: diffratio.ToDo(factor=2), diffratio.ToDo),
    Row("todo by block", "todo", lambda: diffratio.ToDo(factor=(1, 3, 4)), lambda: diffratio.ToDo(factor=(1, 1, 1))),
    _tome("tome"),
    _tome("tome both sites", sites=BOTH),
    _tome("tome normed", metric="normed"),
    _tome("tome normed both sites, fixed", metric="normed", sites=BOTH, random=False),
    _tome("tome feed_forward, one block", sites=("feed_forward",), layers=(1,)),
    _tome("tome one plan a step", sites=BOTH, plan_blocks=None),
    _tofu("tofu"),
    _tofu("tofu both sites, drops in one block", sites=BOTH, switch=0.4),
    _tofu("tofu normed, merges only", metric="normed", switch=0.0),
    _sdtm("sdtm"),
    _sdtm("sdtm release, every block", variant="release", plan_blocks=1, random=False),
    _sdtm("sdtm detail soon, shared steps", switch=0.0, plan_every=3, detail_sites=BOTH),
    Row(
        "sdtm_cached",
        "sdtm_cached",
        diffratio.SDTMCached,
        lambda: diffratio.SDTMCached(refresh=1),
        whole_run=True,  # the first step is dense
    ),
    _importance("importance"),
    _importance("importance sd", variant="sd", drop_steps=0),
    _importance("importance sd, one plan a step", variant="sd", plan_blocks=None, sites=BOTH),
    _dato("dato"),
    _dato("dato cached results", whole_run=True, every=3.0, scope="attn_ff", fill="cached", ratio=0.6),  # not step 0
    _dato("dato release queries", action="E", scope="attn_q", refill="release", polarity="random"),
    _block_cache("block_cache", extrapolate=True),
    _external("external_cache", threshold=0.5),
    _external("external_cache in blocks", cache="pyramid_attention_broadcast", interval=2),
]
BACKBONES = ("dit", "pixart", "sd3", "flux")
SHARED = ("img_ids", "txt_ids")  # arguments of a forward without a batch
TEXT = 5  # text tokens of the batches of text-conditional families
# the ways in which methods use a whole block: once with bypass and samples in groups, and twice; on two streams the
# methods that work on its sites, and all others, are in tests/backbones/test_sd3.py and test_flux.py
WAYS = ("measured", "diffcr learning")
ALL_ROWS = ("dit", "pixart")
CASES = [(row, backbone) for row in ROWS for backbone in BACKBONES if backbone in ALL_ROWS or row.name in WAYS]
IDS = [f"{row.name}-{backbone}".replace(" ", "_") for row, backbone in CASES]


def transformer_of(backbone: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny transformer in evaluation mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return get_backbone(backbone).tiny(**changes).eval()


def applied(row: Row, backbone: str, seed: int = 0, neutral: bool = False) -> Any:
    """A tiny transformer with the row's method; learned ratios stand between bins, and on one."""
    transformer = transformer_of(backbone, seed)
    diffratio.apply_(transformer, row.neutral() if neutral else row.config())
    attachment(transformer).halves = row.halves
    if row.ratios and not neutral:
        with torch.no_grad():
            rho = transformer.keep_ratios.rho
            rho.copy_(0.15 + 0.8 * torch.rand(rho.shape, generator=torch.Generator().manual_seed(1)))
            rho[0, 0] = 0.5
    return transformer


def inputs(
    levels: tuple[float, ...] = LEVELS, dtype: torch.dtype = torch.float32, seed: int = 3, backbone: str = "dit"
) -> dict[str, Tensor]:
    """A batch with one sample at each noise level, each with a class or a prompt (of another length) of its own."""
    generator, batch = torch.Generator().manual_seed(seed), len(levels)
    if backbone == "flux":
        return _flux_inputs(levels, dtype, generator)
    arguments = {
        "hidden_states": torch.randn(batch, 1, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([1000 * level for level in levels]),
    }
    if get_backbone(backbone).condition == "class":
        return arguments | {"class_labels": torch.arange(batch) % 10}
    arguments["encoder_hidden_states"] = torch.randn(batch, TEXT, 12, generator=generator).to(dtype)
    if "pooled_projections" in get_backbone(backbone).batched:
        return arguments | {"pooled_projections": torch.randn(batch, 6, generator=generator).to(dtype)}
    lengths = 1 + torch.arange(batch) % TEXT
    return arguments | {"encoder_attention_mask": (torch.arange(TEXT) < lengths[:, None]).long()}


def _flux_inputs(levels: tuple[float, ...], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Samples by token, and places of image and text tokens that all samples share."""
    batch = len(levels)
    shapes = {"hidden_states": (16, 4), "encoder_hidden_states": (TEXT, 12), "pooled_projections": (6,)}
    arguments = {name: torch.randn(batch, *one, generator=generator).to(dtype) for name, one in shapes.items()}
    shared = {"img_ids": image_ids(GRID), "txt_ids": torch.zeros(TEXT, 3)}
    return arguments | shared | {"timestep": torch.tensor(levels), "guidance": 1 + torch.arange(batch).float()}


def samples_of(batch: dict[str, Tensor], samples: slice | Tensor) -> dict[str, Tensor]:
    """Some samples of a batch."""
    return {name: value if name in SHARED else value[samples] for name, value in batch.items()}


def unconditional(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same samples without their condition: the null label, or an empty prompt."""
    if "class_labels" in batch:
        return batch | {"class_labels": torch.full_like(batch["class_labels"], 10)}
    empty = {
        name: torch.full_like(batch[name], 0.5)
        for name in ("encoder_hidden_states", "pooled_projections")
        if name in batch
    }
    if "encoder_attention_mask" in batch:
        mask = batch["encoder_attention_mask"]
        empty["encoder_attention_mask"] = (torch.arange(mask.shape[1]) < 1).long().expand_as(mask)
    return batch | empty


def run_of(backbone: str) -> SamplingRun:
    """`RUN`, with the text tokens of `inputs`."""
    return RUN if get_backbone(backbone).condition == "class" else replace(RUN, text_tokens=TEXT)


PAIRED = ("sdtm", "sdtm_cached", "importance", "dato")  # these plan for both guidance halves at once


def pairs_halves(transformer: nn.Module) -> bool:
    """Whether a method is attached whose plans serve both guidance halves of a batch."""
    return transformer.__dict__.get("_diffratio") is not None and attachment(transformer).token_method.name in PAIRED


def keeps_state(transformer: nn.Module) -> bool:
    """Whether a method is attached that needs an open run."""
    state = transformer.__dict__.get("_diffratio")
    return state is not None and any(method.stateful for method in state.methods)


@contextmanager
def halves(transformer: nn.Module, order: Halves) -> Iterator[None]:
    """Forwards in here hold both guidance halves in that order."""
    if not is_applied(transformer):
        yield
        return
    state = attachment(transformer)
    before, state.halves = state.halves, order
    try:
        yield
    finally:
        state.halves = before


def forward(transformer: nn.Module, batch: dict[str, Tensor] | None = None, paired: bool | None = None) -> Tensor:
    """The prediction for a batch; of a method that pairs guidance halves, that of the conditional half.

    A method that keeps state is at step 0 of a run unless the test has put it elsewhere.
    """
    backbone = backbone_of(transformer)
    batch = inputs(backbone=backbone.name) if batch is None else batch
    if keeps_state(transformer) and attachment(transformer).run is None:
        in_run(transformer, RUN, 0)
    if not (pairs_halves(transformer) if paired is None else paired):
        output = transformer(**batch, return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output
    order, null = backbone.guidance_order, unconditional(batch)
    first, second = (batch, null) if order == "cond_first" else (null, batch)
    whole = {name: batch[name] if name in SHARED else torch.cat([first[name], second[name]]) for name in batch}
    with halves(transformer, order):
        both = transformer(**whole, return_dict=False)[0]
    assert isinstance(both, Tensor)
    return both.chunk(2)[0 if order == "cond_first" else 1]


def train_(transformer: nn.Module, mode: bool = True) -> Any:
    """Training mode, except for methods that keep state: they only sample."""
    return transformer.train(mode and not keeps_state(transformer))


def without_label_dropout(transformer: Any) -> Any:
    """The dense model as the data path of a training run sees it: labels are dropped there, not in every block."""
    for embedder in label_embedders(transformer):
        embedder.dropout_prob = 0.0
    return transformer


def label_embedders(transformer: Any) -> list[Any]:
    """The modules that drop class labels in training mode; a text-conditional family has none."""
    return [module for module in transformer.modules() if isinstance(module, LabelEmbedding)]


def in_run(transformer: nn.Module, run: SamplingRun, step: int) -> nn.Module:
    """Puts a transformer at one step of an open run."""
    state = attachment(transformer)
    state.open_run(run)
    state.step = step
    return transformer
