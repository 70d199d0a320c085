"""Every shipped config composes, says how it is run, and passes the check."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Trainer
from omegaconf import OmegaConf

from diffratio.bench.settings import SECTIONS, BenchSettings, expanded
from diffratio.data.images import ImageData
from diffratio.data.latents import LatentData
from diffratio.data.precompute import PrecomputeSettings
from diffratio.errors import DiffratioError
from diffratio.files import configs_folder
from diffratio.inpainting import InpaintSettings
from diffratio.methods import get_method, methods
from diffratio.objectives import objectives
from diffratio.search.settings import SearchSettings
from diffratio.surgery import LoraSettings
from diffratio.training.build import build_transformer
from diffratio.training.run import check, compose, plain_config
from diffratio.training.settings import BudgetSettings, OptimizerSettings

ROOT = configs_folder()
FILES = sorted(path for path in ROOT.rglob("*.yaml") if "hydra" not in path.parts)  # see test_the_slurm_launcher
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
EXPERIMENTS = [path.stem for path in sorted((ROOT / "experiment").glob("*.yaml"))]
PUBLISHED = ("pixart_sigma_512_diffcr", "dit_xl_256_diffcr")
VERBS = ("train", "compare", "bench", "precompute", "search")
NEEDED = {  # others: data.source
    "bench": (),
    "search": ("out=here",),
    "precompute": ("data.source=here", "vae=here", "out=here"),
}
MEMBERS = [(path.parent.name, path.stem) for path in FILES if path.parent != ROOT]


def values_of(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def test_there_are_configs() -> None:
    assert set(VERBS) <= {path.stem for path in ROOT.glob("*.yaml")}
    assert {"fashion_diffcr", "fashion_pretrain"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_passes_the_check(name: str) -> None:
    found = check(compose("train", [f"experiment={name}"]))
    assert found["experiment"] == name
    low, high = found["budget"]["reachable"]
    assert low <= found["budget"]["target"] <= high == 1.0
    assert found["parameters"] > 0 and found["macs"]["dense_run"] > found["macs"]["dense_forward"] > 0
    block = found["macs"]["block_by_bin"]
    assert block[0] == 0 and block == sorted(block)


@pytest.mark.parametrize(("group", "member"), MEMBERS, ids=["/".join(pair) for pair in MEMBERS])
def test_every_member_composes(group: str, member: str) -> None:
    verb = next((verb for verb in VERBS if member.endswith(f"_{verb}")), "train")
    cfg = compose(verb, [f"{group}={member}", *NEEDED.get(verb, ["data.source=here"])])
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    own = {key: value for key, value in values_of(ROOT / group / f"{member}.yaml").items() if key != "defaults"}
    whole = group in ("experiment", "debug")
    inside = plain if whole else plain[group]
    for key, value in own.items():
        if not isinstance(value, str | dict):  # references are resolved by now
            assert inside[key] == value, key


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_first_line_is_a_command_that_composes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    line = lines[1] if lines[0].strip() == "# @package _global_" else lines[0]
    assert line.startswith(("# diffratio ", "# python train.py ")), line
    words = shlex.split(line.removeprefix("# ").split("  ")[0])
    verb = "train" if words[0] == "python" else words[1]
    assert verb in (*VERBS, "check")
    if verb == "check":
        compose("train", [f"experiment={words[2]}", *words[3:]])
    elif verb == "bench":  # its first word says which
        compose(verb, expanded(words[2], words[3:]))
    else:
        compose(verb, words[2:])
    if path.parent != ROOT:  # the command is one for this very file
        named = {path.stem, path.parent.name}
        assert any(any(part in word for part in named) for word in words[2:]), line


@pytest.mark.parametrize("verb", VERBS)
def test_debug_means_the_file_of_the_verb(verb: str) -> None:
    own = "cpu" if verb == "train" else f"cpu_{verb}"
    written = [
        OmegaConf.to_yaml(compose(verb, words), resolve=False)  # resolved, the run folder holds the second it was asked
        for words in (["debug=cpu"], [f"debug={own}"], [])
    ]
    assert written[0] == written[1] != written[2]


def test_bench_file_holds_the_defaults() -> None:
    values = values_of(ROOT / "bench.yaml")
    for name, cls in (("", BenchSettings), *SECTIONS.items()):
        section = values[name] if name else {key: values[key] for key in values if key not in (*SECTIONS, "defaults")}
        section.pop("name", None)
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        assert set(section) == set(fields)
        for key, value in section.items():
            assert (tuple(value) if isinstance(value, list) else value) == fields[key], key


def test_precompute_file_holds_the_defaults() -> None:
    values = values_of(ROOT / "precompute.yaml")
    fields = {field.name: field.default for field in dataclasses.fields(PrecomputeSettings)}
    assert set(values) - {"defaults", "seed"} == set(fields)
    for key, default in fields.items():
        assert values[key] == ("???" if default is dataclasses.MISSING else default), key


def test_search_file_holds_the_defaults() -> None:
    values = values_of(ROOT / "search.yaml")
    fields = {field.name: field.default for field in dataclasses.fields(SearchSettings)}
    assert set(values) - {"defaults"} == set(fields) - {"method"}
    assert SearchSettings.from_config(plain_config(compose("search", ["out=x"]))).method == fields["method"]
    made = SearchSettings.from_config(plain_config(compose("search", ["out=x", "method=fewer_steps"])))
    assert made.allowed_actions == ("C", "R")
    with pytest.raises(DiffratioError, match="takes method=dato alone"):
        SearchSettings.from_config(plain_config(compose("search", ["out=x", "method.every=3"])))
    for key, default in fields.items():
        if default is not dataclasses.MISSING and key != "method":  # a group
            assert (tuple(values[key]) if isinstance(values[key], list) else values[key]) == default, key


def test_trainer_keys_are_lightnings() -> None:
    accepted = set(inspect.signature(Trainer.__init__).parameters)
    own = set(values_of(ROOT / "trainer" / "default.yaml"))
    assert own <= accepted
    assert not own & {"callbacks", "logger", "plugins", "default_root_dir", "check_val_every_n_epoch"}  # we give them


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_keys_are_those_of_the_module(path: Path) -> None:
    values = values_of(path)
    module = LatentData if values.pop("kind", None) == "precomputed" else ImageData
    assert set(values) - {"defaults"} <= set(inspect.signature(module.__init__).parameters)


def test_budget_and_optimizer_files_hold_the_defaults() -> None:
    """One truth: what the YAML says is what the dataclass says, key by key."""
    groups = (("budget", "macs", BudgetSettings), ("optimizer", "adamw", OptimizerSettings))
    for group, member, cls in (*groups, ("lora", "default", LoraSettings), ("inpaint", "default", InpaintSettings)):
        values = values_of(ROOT / group / f"{member}.yaml")
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        assert set(values) == set(fields)
        for key, value in values.items():
            assert (tuple(value) if isinstance(value, list) else value) == fields[key], key


def test_methods_and_objectives_have_their_files() -> None:
    assert {path.stem for path in (ROOT / "method").glob("*.yaml")} == set(methods())
    for path in (ROOT / "method").glob("*.yaml"):
        values = values_of(path)
        assert values.pop("name") == path.stem
        assert set(values) <= {field.name for field in dataclasses.fields(get_method(path.stem).config_class)}
    assert {path.stem for path in (ROOT / "objective").glob("*.yaml")} == set(objectives())
    for path in (ROOT / "objective").glob("*.yaml"):
        assert values_of(path)["name"] == path.stem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=diffcrr"], "unknown method 'diffcrr': did you mean diffcr"),
        (["experiment=fashion_modd"], "did you mean fashion_mod"),
        (["optimizer=adam"], "did you mean adamw"),
        (["metod=mod"], "did you mean method"),
        (["trainer.max_step=3"], "did you mean trainer.max_steps"),
        (["optimizer.learning_rate=3"], "unknown config key 'optimizer.learning_rate'"),
        (["trainer"], "write key=value"),
        (["seed=1,2"], "several values need a multirun"),
    ],
)
def test_unknown_names_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(DiffratioError) as caught:
        compose("train", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.target=0", "budget.target"),
        ("budget.target=1.5", "budget.target"),
        ("budget.target=lots", "it takes a finite number"),
        ("budget.freeze=0.1", "lies before budget.anneal"),
        ("budget.anneal=-1", "outside [0, 1]"),
        ("budget.steps=0", "at least 1"),
        ("optimizer.lr=-1", "must not be negative"),
        ("optimizer.ema=1", "outside [0, 1)"),
        ("optimizer.weights=some", "known are all, none"),
        ("optimizer.schedule=cosin", "did you mean cosine"),
        ("optimizer.clip=null", "it takes a finite number"),
        ("+optimizer.momentum=0.9", "unknown key of optimizer 'momentum'"),
        ("objective.distill=-1", "must not be negative"),
        ("objective.timesteps=all", "known are iid, one_region, stratified"),
        ("method.regions=0", "1..1000"),
        ("method.estimator=fast", "known are grouped, loop, soft"),
        ("+method.keep=0.5", "unknown key of method 'diffcr' 'keep'"),
        ("backbone.name=dot", "did you mean dit"),
        ("backbone.source=null", "needs a source"),
        ("backbone.source=nowhere/at/all", "nowhere/at/all"),
        ("data.image_size=28", "set data.image_size"),
        ("data.channels=3", "set data.channels"),
        ("data.num_classes=7", "set data.num_classes"),
        ("data.label_dropout=2", "label_dropout must lie in [0, 1]"),
        ("data.batch_size=0", "batch_size must be at least 1"),
        ("data.batch_size=1000000000", "batch_size must be at most 65,536"),
        ("data.batch_size=0.5", "batch_size must be an integer"),
        ("data.image_size=9223372036854775808", "image_size must be at most 65,536"),
        ("data.num_workers=-1", "num_workers must be at least 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: it takes a finite number"),
        ("objective.distill=inf", "objective.distill=inf: it takes a finite number"),
        ("trainer.max_steps=-0.5", "trainer.max_steps -0.5 must be an integer of at least 1"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval 0 must be an integer of at least 1"),
        ("callbacks.final_n=-1", "callbacks.final_n -1 must be at least 1"),
        ("callbacks.pictures_every=-1", "callbacks.pictures_every -1 must be at least 0"),
        ("callbacks.ratios_every=0", "callbacks.ratios_every 0 must be at least 1"),
        ("trainer.num_nodes=0", "trainer.num_nodes 0 must be an integer of at least 1"),
        ("trainer.enable_progress_bar=maybe", "trainer.enable_progress_bar='maybe': it takes true or false"),
        ("backbone.gradient_checkpointing=yess", "backbone.gradient_checkpointing='yess': it takes true or false"),
        ("backbone.config=3", "backbone.config is 3; it takes {key: value}, or null"),
        ("data.flip=maybe", "flip='maybe': it takes true or false"),
        ("data.channels=true", "channels must be 1 (grey) or 3 (RGB), got True"),
        ("method.router_sees_mask=1", "router_sees_mask is 1; it takes true or false"),
        ("callbacks.nonfinite=ignore", "known are skip, stop"),
        ("+data.size=3", "size"),
    ],
)
def test_bad_values_are_one_line(override: str, message: str) -> None:
    with pytest.raises(DiffratioError) as caught:
        check(compose("train", [override]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(DiffratioError, match="data.source has no value; give it as data.source=value"):
        check(compose("train", ["data=folder"]))


def test_published_models_are_checked_without_weights() -> None:
    """What the papers say of their size: DiT-XL/2 675 M without diffusers' embedder in every block, PixArt 0.6 B."""
    sigma, dit = (check(compose("train", [f"experiment={name}"])) for name in PUBLISHED)
    assert sigma["parameters"] == 610_856_096 and sigma["tokens"] == 1024 and sigma["lora_parameters"] < 3e7
    assert dit["macs"]["dense_forward"] == pytest.approx(118.6e9, rel=0.005) and dit["tokens"] == 256


def test_a_config_beside_a_source_must_be_true_of_it() -> None:
    wrong = ["backbone.source=fashion-dit", "+backbone.config.num_layers=9"]
    with pytest.raises(DiffratioError, match="num_layers is 9, and backbone.source='fashion-dit' has 8"):
        measured = compose("train", ["experiment=fashion_dense", *wrong])
        build_transformer(plain_config(measured))


def test_the_slurm_launcher() -> None:
    """It composes without the plugin, and has the plugin's keys where that is installed."""
    path = ROOT / "hydra" / "launcher" / "slurm.yaml"
    line = path.read_text(encoding="utf-8").splitlines()[0]
    assert line.startswith("# python train.py -m hydra/launcher=slurm ") and line.endswith("ckpt_path=last")
    compose("train", ["hydra/launcher=slurm"])
    plugin = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config", reason="needs diffratio[slurm]")
    assert set(values_of(path)) == {field.name for field in dataclasses.fields(plugin.SlurmQueueConf)}
