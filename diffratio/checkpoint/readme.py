"""README.md of a checkpoint, from its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffratio.checkpoint.card import Card
from diffratio.routing.schedule import Table

_TEMPLATE = """---
license: {licence}
library_name: {library}
pipeline_tag: {task}
---
# {name}

{kind_line}

| | |
| --- | --- |
| backbone | {backbone} |
| objective | {objective} |
| parameters | {parameters:,} |
| data | {data} |
| sampler | {sampler}, {steps} steps, guidance {guidance:g} |
| classes | {classes} |
| licence | {licence} |

## Use
```python
{usage}
```
{keep}
## Training
{training}

## Metrics
{metrics}

## Reproduce
{reproduce}
"""

_PIPELINE = """import diffratio

pipe = diffratio.load_pipeline({name!r})
images = pipe({samples}, {known}num_inference_steps={steps}, guidance_scale={guidance:g}).images"""

_DENSE_LINE = "A dense diffusion transformer; `transformer/` loads in plain diffusers, too."
_ROUTED_LINE = (
    "A diffusion transformer with learned token routing: in every block only the best tokens are computed. "
    "It needs diffratio; plain diffusers refuses to load it."
)
_ADAPTER_LINE = (
    "A LoRA adapter{routed}: it holds what was trained and stands on the weights of `{base}`, which it is merged into "
    "when diffratio loads it. `adapter_config.json` and `adapter_model.safetensors` are peft's."
)


def render_readme(
    card: Card,
    parameters: int,
    bins: Table | None = None,
    fraction: float | None = None,
    text: bool = False,
    base: str | None = None,
) -> str:
    """The model card as Markdown.

    Args:
        card: what is known of the checkpoint.
        parameters: number of parameters.
        bins: keep ratios in tenths [layer][region], where it is routed.
        fraction: its MACs on its sampling run over those of the dense model.
        text: whether it is sampled by prompts, not by class.
        base: of an adapter, the checkpoint that it stands on.
    """
    usage = _PIPELINE.format(
        name=card.name,
        samples='["a prompt"]' if text else "[0, 1]",
        known="" if card.inpaint is None else "image=picture, mask=white_in_the_hole, ",
        steps=card.sampler.steps,
        guidance=card.sampler.guidance_scale,
    )
    line = _ROUTED_LINE if card.kind == "routed" else _DENSE_LINE
    if base is not None:
        line = _ADAPTER_LINE.format(base=base, routed=" with token routers" if card.kind == "routed" else "")
    return _TEMPLATE.format(
        name=card.name,
        licence=card.licence.lower(),
        library="diffratio" if card.kind == "routed" or base is not None else "diffusers",
        task="text-to-image" if text else "unconditional-image-generation",
        kind_line=line,
        backbone=card.backbone,
        objective=card.objective,
        parameters=parameters,
        data=card.data or "not recorded",
        sampler=card.sampler.name,
        steps=card.sampler.steps,
        guidance=card.sampler.guidance_scale,
        classes=", ".join(card.class_names) or "not named",
        usage=usage,
        keep="" if bins is None else _keep_section(bins, fraction),
        training=_table(card.training, "setting"),
        metrics=_table(card.metrics, "metric"),
        reproduce=f"```\n{card.reproduce}\n```" if card.reproduce else "Not recorded.",
    )


def _keep_section(bins: Table, fraction: float | None) -> str:
    regions = len(bins[0])
    heads = [f"u {region / regions:.2g}..{(region + 1) / regions:.2g}" for region in range(regions)]
    rows = [f"| {layer} | " + " | ".join(f"{bin_ / 10:.1f}" for bin_ in row) + " |" for layer, row in enumerate(bins)]
    cost = "" if fraction is None else f" On the run of its schedule it costs {fraction:.3f} of the dense MACs."
    lines = [
        "\n## Keep ratios",
        f"Fraction of the image tokens that each layer computes, by region of the noise level u (0 is clean).{cost}\n",
        "| layer | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * regions,
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, Any], head: str) -> str:
    if not values:
        return "Not recorded."
    rows = [f"| {key} | {_value(value)} |" for key, value in values.items()]
    return "\n".join([f"| {head} | value |", "| --- | --- |", *rows])


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    return str(value)
