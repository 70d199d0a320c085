"""From plain settings to the objects of a job: data, transformer, method, module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffratio import surgery
from diffratio.backbones import backbone_of, get_backbone
from diffratio.backbones.base import NOTES
from diffratio.backbones.widening import image_channels
from diffratio.checkpoint import load_skeleton, load_transformer, read_card, resolve, text_of
from diffratio.conditions import Captions
from diffratio.cost.macs import CostTable, Description, macs_table, ratio_table
from diffratio.cost.run import SamplingRun
from diffratio.cost.table import LatencyTable, load_cost_table
from diffratio.data import open_data
from diffratio.data.images import ImageData
from diffratio.data.latents import LatentData
from diffratio.errors import DiffratioError, shortened
from diffratio.inpainting import InpaintSettings
from diffratio.methods.base import MethodConfig, config_from_json, get_method, methods, solve_for_budget
from diffratio.objectives import Objective, get_objective
from diffratio.plain import switches, typed
from diffratio.routing.schedule import KeepSchedule
from diffratio.sampling.schedulers import noise_levels, objective_of, set_steps
from diffratio.training.inpaint import sees_holes_
from diffratio.training.latents import base_scheduler, check_latents, own_scheduler
from diffratio.training.lora import base_weights
from diffratio.training.module import Training, dense_copy
from diffratio.training.schedules import read_schedule
from diffratio.training.settings import (
    BudgetSettings,
    Config,
    LossSettings,
    OptimizerSettings,
    callback_settings,
)

_LOSS = ("timesteps", "distill")  # keys of the objective group that say how it is minimised


def build_data(cfg: Config) -> ImageData:
    """The data module."""
    return open_data(cfg["data"], inpaint_settings(cfg))


def build_transformer(cfg: Config, data: ImageData | None = None, weights: bool = True) -> nn.Module:
    """The dense transformer, fp32, checked against the data; without weights on the meta device."""
    settings = cfg["backbone"]
    backbone = get_backbone(settings["name"])
    if not isinstance(settings["config"], Mapping | None):
        raise DiffratioError(f"backbone.config is {shortened(settings['config'])}; it takes {{key: value}}, or null")
    switches(settings, "backbone", ["gradient_checkpointing"])
    given = {key: value for key, value in (settings["config"] or {}).items() if key not in NOTES}
    if settings["source"] and (weights or not given):
        transformer = load_transformer(settings["source"]) if weights else load_skeleton(settings["source"])
        if surgery.is_applied(transformer):
            raise DiffratioError(
                f"backbone.source={settings['source']!r} is a routed checkpoint; training starts from a dense one"
            )
        _check_config(settings, transformer)
    elif given:
        transformer = backbone.from_config(given)
    else:
        raise DiffratioError("backbone needs a source (a checkpoint) or a config (random weights); both are null")
    if not backbone.matches(transformer):
        raise DiffratioError(f"backbone.source={settings['source']!r} is no {backbone.name} transformer")
    if noted := {key: value for key, value in (settings["config"] or {}).items() if key in NOTES and value}:
        transformer.register_to_config(**noted)  # type: ignore[operator]
    _check_objective(cfg, weights)
    sees_holes_(transformer, cfg, inpaint_settings(cfg))
    if isinstance(data, LatentData):
        check_latents(transformer, data, settings["source"], cfg["objective"]["name"])
    elif data is not None:
        size, channels = cfg["data"]["image_size"], cfg["data"]["channels"]
        backbone.grid(transformer, torch.empty(1, channels, size, size, device="meta"))
        _check_buckets(transformer, data, channels)
        side = backbone.sample_side(transformer)
        if size != side:
            free = f", or backbone.config={{_token_side:{size // backbone.fold}}}" if backbone.fold > 1 else ""
            raise DiffratioError(
                f"data.image_size={size} does not fit a model of sample_size {side}; set data.image_size{free}"
            )
        if channels != image_channels(transformer):
            raise DiffratioError(
                f"data.channels={channels} does not fit a model of {image_channels(transformer)} input channels; "
                "set data.channels"
            )
        if backbone.condition == "text":
            _check_text(cfg, transformer, data, weights)
        elif cfg["data"]["num_classes"] != backbone.null_label(transformer):
            raise DiffratioError(
                f"data.num_classes={cfg['data']['num_classes']} does not fit a model of "
                f"{backbone.null_label(transformer)} classes; set data.num_classes"
            )
    if settings["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    return transformer


def _check_buckets(transformer: nn.Module, data: ImageData, channels: int) -> None:
    """Raises DiffratioError where a bucket is no token grid of the model."""
    for height, width in data.buckets or ():
        try:
            backbone_of(transformer).grid(transformer, torch.empty(1, channels, height, width, device="meta"))
        except DiffratioError as error:
            raise DiffratioError(f"data.buckets=[{height}, {width}]: {error}") from None


def _check_objective(cfg: Config, weights: bool) -> None:
    """A base whose card says what it predicts is trained to predict that, and no family what it cannot."""
    able = get_backbone(cfg["backbone"]["name"]).objectives
    if cfg["objective"]["name"] not in able:
        raise DiffratioError(
            f"objective={cfg['objective']['name']}: backbone {cfg['backbone']['name']} predicts {', '.join(able)}; "
            f"set objective={able[0]}"
        )
    place = resolve(cfg["backbone"]["source"]) if cfg["backbone"]["source"] and weights else None
    if isinstance(place, Path) and (place / "card.json").is_file():
        own, asked = read_card(place).objective, cfg["objective"]["name"]
        if own != asked:
            raise DiffratioError(
                f"objective={asked}, and backbone.source={cfg['backbone']['source']!r} predicts {own}; "
                f"set objective={own}"
            )


def _check_config(settings: Config, transformer: nn.Module) -> None:
    """Where a config stands beside a source it says what is there, so that a check needs no weights."""
    found: Any = transformer.config
    for key, value in (settings["config"] or {}).items():
        here = image_channels(transformer) if key == "in_channels" else found.get(key)  # a widened base has more
        if key not in NOTES and here != value:
            raise DiffratioError(
                f"backbone.config.{key} is {value!r}, and backbone.source={settings['source']!r} has "
                f"{here!r}; mend it, or set backbone.config=null"
            )


def _check_text(cfg: Config, transformer: nn.Module, data: ImageData, weights: bool) -> None:
    """Notes how many text tokens a sample has; raises DiffratioError where captions do not fit the model.

    Captions are encoded for training alone: without weights what the settings say is all that is checked.
    """
    backbone, source, text = backbone_of(transformer), cfg["backbone"]["source"], cfg["data"].get("text")
    if not text:
        raise DiffratioError(
            f"backbone {backbone.name} is conditioned on text, and data={cfg['data']['name']} gives none; choose data "
            "with captions (data=emoji64), or set data.text.encoder, data.text.tokens and data.caption_column"
        )
    made_for = text_of(source) if source else None
    if made_for is not None and made_for.tokens != text["tokens"]:
        raise DiffratioError(
            f"backbone.source={source!r} reads text of {made_for}, and data.text.tokens is {text['tokens']}; "
            f"set data.text.tokens={made_for.tokens}"
        )
    backbone.set_text_tokens_(transformer, text["tokens"])
    if not weights:
        return
    conditions = data.conditions
    assert isinstance(conditions, Captions)
    if made_for is not None and conditions.encoder != made_for:
        raise DiffratioError(
            f"backbone.source={source!r} reads text of {made_for}, and here it is encoded by {conditions.encoder}; "
            f"set data.text.encoder to that one ({made_for.name})"
        )
    width = backbone.text_width(transformer)
    if conditions.encoder.width != width:
        raise DiffratioError(
            f"data.text.encoder={text['encoder']} gives {conditions.encoder.width} channels a token, and the model "
            f"takes {width}; choose another encoder, or set caption_channels of a model with random weights"
        )
    pooled = backbone.pooled_width(transformer)
    if conditions.encoder.pooled != pooled:
        raise DiffratioError(
            f"data.text.encoder={text['encoder']} gives pooled states of {conditions.encoder.pooled} channels, and "
            f"backbone {backbone.name} takes {pooled}; name "
            + ("the folder of a pipeline of that family, whose encoders give them" if pooled else "one text encoder")
        )


def build_method(cfg: Config, transformer: nn.Module, budget: BudgetSettings) -> MethodConfig:
    """The method's config; presets without a schedule are solved for the budget."""
    values = dict(cfg["method"])
    name = values.get("name", "")
    cls = get_method(name)
    if not cls.learned and name != "dense":
        trainable = ", ".join(["dense", *(one for one in methods() if get_method(one).learned)])
        raise DiffratioError(f"method {name!r} is training-free; train takes {trainable}, compare takes every method")
    run = budget_run(cfg, transformer, budget)
    costs = None if budget.unit == "macs" else budget_costs(transformer, budget, run)
    for key in ("schedule", "start"):
        if isinstance(values.get(key), str):
            found = read_schedule(values[key], name, transformer, run, budget.target, key, costs)
            values |= {key if one == "schedule" else one: value for one, value in found.items()}
    given = {key: value for key, value in values.items() if value is not None}
    if cls.learned and name != "diffcr" and given.keys() <= {"name", "ranking", "router_sees_mask"}:
        description = described(transformer, cfg)
        config = solve_for_budget(cls, description, run, budget.target, costs)
        return dataclasses.replace(config, **{key: value for key, value in given.items() if key != "name"})
    return config_from_json(given)


def described(transformer: nn.Module, cfg: Config) -> Description:
    """What the job's transformer costs, with what its routers see."""
    description = backbone_of(transformer).describe(transformer)
    return dataclasses.replace(description, router_inputs=1 if cfg["method"].get("router_sees_mask") else 0)


def budget_run(cfg: Config, transformer: nn.Module, budget: BudgetSettings) -> SamplingRun:
    """The sampling run that a budget counts.

    Its levels are those of the sampler that the checkpoint will have: some visit 0.999 of the even levels, and at an
    edge that is another region.
    """
    backbone, objective = backbone_of(transformer), cfg["objective"]["name"]
    run = backbone.default_run(transformer, budget.steps, "cfg" if budget.guidance else "none")
    if objective == "flow":
        return run
    scheduler = None
    if objective == "noise" and backbone.condition == "text":
        scheduler = base_scheduler(cfg["backbone"]["source"])
    if scheduler is None or objective_of(scheduler) != objective:
        scheduler = own_scheduler(transformer, objective)
    set_steps(scheduler, budget.steps)
    levels = noise_levels(scheduler)
    # some samplers of second order evaluate more often than they are asked to
    return dataclasses.replace(run, noise_levels=levels) if len(levels) == budget.steps else run


def budget_table(transformer: nn.Module, budget: BudgetSettings, run: SamplingRun) -> LatencyTable | None:
    """The measured table that a budget in milliseconds counts on, None for other units.

    Raises:
        DiffratioError: no such table, or one of another model or grid.
    """
    if budget.unit != "latency":
        return None
    assert budget.table is not None
    try:
        return load_cost_table(budget.table).require(backbone_of(transformer).describe(transformer), run)
    except DiffratioError as error:
        raise DiffratioError(f"budget.table={budget.table}: {error}") from None


def budget_costs(transformer: nn.Module, budget: BudgetSettings, run: SamplingRun) -> CostTable:
    """The cost table of a run in the budget's unit."""
    description = backbone_of(transformer).describe(transformer)
    table = budget_table(transformer, budget, run)
    if table is not None:
        return table.costs(run)
    return macs_table(description, run) if budget.unit == "macs" else ratio_table(description.layers, run)


def build_objective(cfg: Config) -> Objective:
    """The objective, without what belongs to the loss."""
    values = {key: value for key, value in cfg["objective"].items() if key not in _LOSS}
    return get_objective(values.pop("name"), **values)


def lora_settings(cfg: Config) -> surgery.LoraSettings | None:
    """LoRA's settings, or None where all weights are trained.

    Raises:
        DiffratioError: a value out of range, or weights that are not to be trained at all.
    """
    values = cfg.get("lora") or {}  # runs of earlier versions have none
    if values.get("rank") is None:
        return None
    if isinstance(values.get("targets"), str):  # one needs no brackets
        values = {**values, "targets": [values["targets"]]}
    settings = typed(surgery.LoraSettings, values, "lora")
    if cfg["optimizer"]["weights"] == "none":
        raise DiffratioError(
            "optimizer.weights=none trains routing alone and lora.rank asks for LoRA; set optimizer.weights=all, which "
            "trains LoRA in place of the weights, or lora=none"
        )
    return settings


def inpaint_settings(cfg: Config) -> InpaintSettings | None:
    """Settings of inpainting, or None where the model sees the noised picture alone."""
    values = cfg.get("inpaint") or {}  # runs of earlier versions have none
    return None if values.get("mask") is None else typed(InpaintSettings, values, "inpaint")


def build_module(cfg: Config, data: ImageData | None) -> Training:
    """The LightningModule with its transformer, method, objective and teacher."""
    budget = typed(BudgetSettings, cfg["budget"], "budget")
    optimizer = typed(OptimizerSettings, cfg["optimizer"], "optimizer")
    shared = {key: cfg["objective"][key] for key in _LOSS}
    loss = typed(LossSettings, {**shared, "seed": cfg["seed"]}, "objective")
    callbacks = callback_settings(cfg)
    objective, lora = build_objective(cfg), lora_settings(cfg)
    torch.manual_seed(cfg["seed"])
    transformer = build_transformer(cfg, data)
    base = base_weights(cfg["backbone"]["source"], transformer) if lora else None
    method = build_method(cfg, transformer, budget)
    teacher = dense_copy(transformer, share=lora is not None) if loss.distill else None
    surgery.apply_(transformer, method, seed=cfg["seed"])
    if lora:
        surgery.add_lora_(transformer, lora)
    run = budget_run(cfg, transformer, budget)
    schedule = getattr(method, "schedule", None)
    if isinstance(schedule, KeepSchedule):
        run = schedule.run
    costs = macs_table(described(transformer, cfg), run)
    if budget.unit != "macs":
        costs = budget_costs(transformer, budget, run)
    if budget.unit == "latency" and isinstance(schedule, KeepSchedule) and schedule.alignment != costs.alignment:
        raise DiffratioError(
            f"method.schedule computes tokens in multiples of {schedule.alignment} and budget.table={budget.table} was "
            f"timed in multiples of {costs.alignment}; `diffratio bench table alignment={schedule.alignment}`"
        )
    conditions = None if data is None else data.conditions
    shown = (conditions, inpaint_settings(cfg))
    watched = (teacher, callbacks.probe_n, costs, callbacks)
    module = Training(transformer, objective, loss, optimizer, budget, run, *watched, *shown)
    module.base = base
    if isinstance(data, LatentData) and module.backbone.condition == "class":
        module.coder = data.coder
    elif isinstance(data, LatentData):
        module.scheduler = base_scheduler(cfg["backbone"]["source"])
    if module.learning_ratios:
        assert module.keep_ratios is not None
        lowest = module.projection.lowest(*module.keep_ratios.rho.shape)
        if budget.target < lowest:
            raise DiffratioError(
                f"budget.target={budget.target:g} cannot be reached: with every keep ratio at 0.1 this model still "
                f"costs {lowest:.3f} of the dense {budget.counted}; set budget.target to at least {lowest:.3f}"
            )
    return module
