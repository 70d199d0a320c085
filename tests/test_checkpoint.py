"""Checkpoint folders: round trips, plain diffusers, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffratio
from diffratio import checkpoint
from diffratio.backbones import get_backbone
from diffratio.checkpoint import Card, SamplerSettings, checkpoint_kind, layout, read_card, require_kind
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.routing.schedule import KeepSchedule
from diffratio.surgery import attachment, is_applied
from diffratio.tokens.grid import TokenGrid

BINS = ((10, 10), (5, 3), (2, 7))
NAMES = [f"class {i}" for i in range(10)]
FULL_CARD = {
    "class_names": NAMES,
    "data": "random numbers",
    "sampler": {"name": "flow_euler", "steps": 4, "guidance_scale": 1.5},
    "training": {"steps": 3, "batch": 2},
    "metrics": {"FID": 12.5},
    "reproduce": "diffratio train experiment=none",
}


def dense(seed: int = 0, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_backbone("dit").tiny(**changes).eval()


def routed(seed: int = 0, bins: Any = BINS, **changes: Any) -> nn.Module:
    schedule = KeepSchedule(bins, uniform_run(4, TokenGrid(4, 4)), 0.8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = diffratio.apply_(dense(seed, **changes), diffratio.DiffCR(schedule=schedule))
        for method in attachment(transformer).methods:
            for router in method.block_modules() or []:
                nn.init.normal_(router.weight)  # type: ignore[arg-type]
    return transformer.eval()


@torch.no_grad()
def outputs(transformer: nn.Module) -> torch.Tensor:
    """One sample in each of two regions, so that every column of the table takes part."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x.to(next(transformer.parameters()).dtype)
    return transformer(x, timestep=torch.tensor([100.0, 900.0]), class_labels=torch.tensor([1, 2])).sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A routed checkpoint."""
    return checkpoint.export(routed(), tmp_path / "routed", card=FULL_CARD)


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A dense one."""
    return checkpoint.export(dense(), tmp_path / "dense", card=FULL_CARD)


def weights_of(folder: Path) -> Path:
    (file,) = (folder / "transformer").glob("*.safetensors")
    return file


def test_routed_round_trip_is_exact(folder: Path) -> None:
    again = diffratio.load_transformer(folder)
    assert not again.training and is_applied(again)
    assert attachment(again).token_method.bins == BINS  # type: ignore[attr-defined]
    assert torch.equal(outputs(again), outputs(routed()))
    assert not torch.equal(outputs(again), outputs(dense()))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "model_index.json",
        "transformer/config.json",
        "transformer/diffratio_model.safetensors",
        "scheduler/scheduler_config.json",
        "card.json",
        "routing.json",
        "README.md",
    }


def test_routed_loads_the_same_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch, diffratio\n"
        "model = diffratio.load_transformer(sys.argv[1])\n"
        "x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad():\n"
        "    y = model(x, timestep=torch.tensor([100.0, 900.0]), class_labels=torch.tensor([1, 2])).sample\n"
        "torch.save(y, sys.argv[2])\n"
    )
    package = str(Path(diffratio.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), outputs(routed()))


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.randn(1)
    torch.manual_seed(3)
    diffratio.load_transformer(folder)
    assert torch.equal(torch.randn(1), expected)


def test_a_dense_checkpoint_loads_in_plain_diffusers(dense_folder: Path) -> None:
    from diffusers import DiTTransformer2DModel

    plain = DiTTransformer2DModel.from_pretrained(dense_folder / "transformer").eval()
    ours = diffratio.load_transformer(dense_folder)
    assert not is_applied(ours) and not (dense_folder / "routing.json").exists()
    assert torch.equal(outputs(plain), outputs(dense()))
    assert torch.equal(outputs(ours), outputs(dense()))


@pytest.mark.parametrize("config", [diffratio.Dense(), diffratio.ToMe(ratio=0.5)], ids=["dense", "tome"])
def test_a_method_without_parameters_exports_the_dense_weights(config: Any, tmp_path: Path) -> None:
    transformer = diffratio.apply_(dense(), config)
    folder = checkpoint.export(transformer, tmp_path / "out")
    assert checkpoint_kind(folder) == "dense" and is_applied(transformer)
    assert torch.equal(outputs(diffratio.load_transformer(folder)), outputs(dense()))


def test_plain_diffusers_refuses_a_routed_checkpoint(folder: Path) -> None:
    from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

    with pytest.raises(OSError, match="no file named"):
        DiTTransformer2DModel.from_pretrained(folder / "transformer")
    with pytest.raises(OSError, match="no file named"):
        DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    for pipeline in (DiffusionPipeline, DiTPipeline):
        with pytest.raises((AttributeError, OSError, ValueError)):
            pipeline.from_pretrained(folder, local_files_only=True)
    assert json.loads((folder / "transformer/config.json").read_text())["_class_name"] == "RoutedDiTTransformer2DModel"


def test_half_precision_storage_keeps_the_routers(tmp_path: Path) -> None:
    original = routed()
    folder = checkpoint.export(original, tmp_path / "half", dtype="float16")
    stored = load_file(weights_of(folder))
    dtypes = {key: value.dtype for key, value in stored.items()}
    assert all(dtype == (torch.float32 if ".router." in key else torch.float16) for key, dtype in dtypes.items())
    assert next(original.parameters()).dtype == torch.float32
    loaded = diffratio.load_transformer(folder)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(loaded), outputs(original), atol=0.02, rtol=0.02)
    half = diffratio.load_transformer(folder, dtype=torch.bfloat16)
    kinds = {(".router." in name, value.dtype) for name, value in half.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert outputs(half).dtype == torch.bfloat16
    with pytest.raises(DiffratioError, match="unknown dtype 'int8'"):
        checkpoint.export(original, tmp_path / "int", dtype="int8")


def test_a_half_precision_transformer_exports_single_precision_routers(tmp_path: Path) -> None:
    folder = checkpoint.export(routed().half(), tmp_path / "half")
    assert load_file(weights_of(folder))["transformer_blocks.1.router.weight"].dtype == torch.float32


def test_a_bare_transformer_folder(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    assert checkpoint_kind(tmp_path / "bare") == "transformer"
    assert torch.equal(outputs(diffratio.load_transformer(tmp_path / "bare")), outputs(dense()))
    with pytest.raises(DiffratioError, match="transformer alone"):
        diffratio.load_pipeline(tmp_path / "bare")


def test_a_sharded_transformer_folder(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "bare", max_shard_size="20KB")  # type: ignore[operator]
    shards = list((tmp_path / "bare").glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(outputs(diffratio.load_transformer(tmp_path / "bare")), outputs(dense()))


def test_keep_ratios_still_being_learned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match="still being learned"):
        checkpoint.export(diffratio.apply_(dense(), diffratio.DiffCR()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frozen_after_learning_round_trips(tmp_path: Path) -> None:
    from diffratio.surgery import drop_root_module_

    transformer = diffratio.apply_(dense(), diffratio.DiffCR(regions=2)).eval()
    attachment(transformer).token_method.freeze_(KeepSchedule(BINS, uniform_run(4, TokenGrid(4, 4))))  # type: ignore
    drop_root_module_(transformer, "keep_ratios")
    again = diffratio.load_transformer(checkpoint.export(transformer, tmp_path / "out"))
    assert torch.equal(outputs(again), outputs(transformer))


def test_presets_without_a_schedule_round_trip(tmp_path: Path) -> None:
    transformer = diffratio.apply_(dense(), diffratio.Hand()).eval()
    again = diffratio.load_transformer(checkpoint.export(transformer, tmp_path / "out"))
    assert attachment(again).token_method.config == diffratio.Hand()
    assert torch.equal(outputs(again), outputs(transformer))


def test_unmerged_parameters_are_refused(tmp_path: Path) -> None:
    transformer = dense()
    transformer.adapter = nn.Linear(2, 2)
    with pytest.raises(DiffratioError, match=r"2 unexpected \(adapter.bias, adapter.weight\)"):
        checkpoint.export(transformer, tmp_path / "out")


def test_card_and_readme(folder: Path) -> None:
    card = read_card(folder)
    assert card == Card(
        name="routed",
        kind="routed",
        sampler=SamplerSettings("flow_euler", 4, 1.5),
        class_names=tuple(NAMES),
        data="random numbers",
        training={"steps": 3, "batch": 2},
        metrics={"FID": 12.5},
        reproduce="diffratio train experiment=none",
    )
    assert Card.from_json(card.to_json()) == card
    text = (folder / "README.md").read_text()
    for part in ("random numbers", "flow_euler, 4 steps", "| FID | 12.5 |", "diffratio train", "| 1 | 0.5 | 0.3 |"):
        assert part in text
    assert f"{diffratio.macs(routed(), run=uniform_run(4, TokenGrid(4, 4))).fraction:.3f} of the dense MACs" in text


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    loaded = get_backbone("dit").load(str(tmp_path / "bare"))
    folder = checkpoint.export(loaded, tmp_path / "out")
    assert str(tmp_path) in str(loaded.config)
    for path in folder.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"kind": "routed"}, "kind is 'routed' and what is exported is 'dense'"),
        ({"backbone": "flux"}, "backbone is 'flux'"),
        ({"class_names": ["a"]}, "1 class_names for a transformer of 10 classes"),
        ({"class_names": "abc"}, "class_names must be a list"),
        ({"metric": {}}, "did you mean metrics"),
        ({"metrics": {"FID": float("nan")}}, "metrics must be plain finite data"),
        ({"sampler": {"step": 3}}, "did you mean steps"),
        ({"sampler": {"steps": 0}}, "sampler.steps"),
        ({"sampler": {"name": "eulr"}}, "unknown sampler"),
        ({"objective": "score"}, "unknown card objective"),
        ({"version": 2}, "upgrade diffratio"),
    ],
)
def test_cards_that_are_refused(card: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DiffratioError, match=message):
        checkpoint.export(dense(), tmp_path / "out", card=card)
    assert not (tmp_path / "out").exists()


def test_the_scheduler_decides_the_objective(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    from diffratio.sampling.schedulers import make_scheduler

    folder = checkpoint.export(dense(), tmp_path / "a", scheduler=make_scheduler("ddim", "noise"))
    assert read_card(folder).objective == "noise"
    assert isinstance(diffratio.load_pipeline(folder).scheduler, DDIMScheduler)
    noise = make_scheduler("ddim", "noise")
    with pytest.raises(DiffratioError, match="objective is 'flow'"):
        checkpoint.export(dense(), tmp_path / "b", scheduler=noise, card={"objective": "flow"})


def test_a_pixel_pipeline_samples_and_is_attached(folder: Path, dense_folder: Path) -> None:
    from diffratio.sampling.pipeline import PixelDiTPipeline
    from diffratio.surgery import attach_

    pipe = diffratio.load_pipeline(folder)
    assert isinstance(pipe, PixelDiTPipeline) and pipe.labels["class 3"] == 3
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def sample(pipe: Any) -> torch.Tensor:
        return pipe(["class 1", 2], latents=noise, num_inference_steps=3, output_type="pt").images

    reference = attach_(PixelDiTPipeline(routed(), pipe.scheduler))
    reference.labels = pipe.labels
    reference.set_progress_bar_config(disable=True)
    assert torch.equal(sample(pipe), sample(reference))
    plain = diffratio.load_pipeline(dense_folder)
    plain.set_progress_bar_config(disable=True)
    assert not is_applied(plain.transformer) and not torch.equal(sample(plain), sample(pipe))
    by_diffusers = PixelDiTPipeline.from_pretrained(dense_folder)
    by_diffusers.transformer.eval()
    by_diffusers.set_progress_bar_config(disable=True)
    assert torch.equal(sample(by_diffusers), sample(plain))


def test_a_latent_pipeline(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DiTPipeline

    from diffratio.sampling.schedulers import make_scheduler
    from diffratio.sampling.vae import identify

    load_plain: Any = DiTPipeline.from_pretrained
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=8,
    )
    sizes: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_embeds_ada_norm": 1000}
    card = {"objective": "noise", "sampler": {"name": "ddim", "steps": 2}}
    scheduler = make_scheduler("ddim", "noise")
    for transformer in (dense(**sizes), routed(**sizes)):
        folder = checkpoint.export(transformer, tmp_path / "out", card=card, scheduler=scheduler, vae=vae)
        pipe = diffratio.load_pipeline(folder)
        assert type(pipe).__name__ == "DiTPipeline"
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            [1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np"
        ).images
        assert images.shape[0] == 2 and images.shape[-1] == 3
        if not is_applied(transformer):
            plain = load_plain(folder)
            plain.set_progress_bar_config(disable=True)
            again = plain([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")
            assert (again.images == images).all()
        for dtype in (torch.float16, torch.bfloat16):
            half = checkpoint.export(
                transformer, tmp_path / "half", dtype=dtype, card=card, scheduler=scheduler, vae=vae
            )
            there = diffratio.load_pipeline(half, device="meta")  # off the CPU: the type that is stored
            assert there.transformer.dtype == there.vae.dtype == dtype
            assert identify(diffratio.load_pipeline(half, dtype).vae, "a") == identify(vae, "a")


def test_overwrites_its_own_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    checkpoint.export(dense(), folder)
    assert checkpoint_kind(folder) == "dense" and not (folder / "routing.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    checkpoint.export(dense(), foreign)  # empty: fine
    shutil.rmtree(foreign)
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("work of years")
    with pytest.raises(DiffratioError, match="not empty and not a diffratio checkpoint"):
        checkpoint.export(dense(), foreign)
    assert (foreign / "thesis.tex").read_text() == "work of years"
    with pytest.raises(DiffratioError, match="is a file"):
        checkpoint.export(dense(), foreign / "thesis.tex")
    with pytest.raises(DiffratioError, match="not writable"):
        checkpoint.export(dense(), foreign / "thesis.tex" / "below")


def test_a_failed_export_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(*args: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("diffratio.checkpoint.save.render_readme", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.export(dense(), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_kinds(folder: Path, dense_folder: Path) -> None:
    assert (checkpoint_kind(folder), checkpoint_kind(dense_folder)) == ("routed", "dense")
    assert require_kind(folder, "routed") == folder and require_kind(dense_folder, "dense") == dense_folder
    require_kind(dense_folder / "transformer", "dense")
    with pytest.raises(DiffratioError, match="is dense, and a routed one is needed"):
        require_kind(dense_folder, "routed")
    with pytest.raises(DiffratioError, match="is routed, and a dense one is needed"):
        require_kind(folder, "dense")
    with pytest.raises(DiffratioError, match="unknown checkpoint kind"):
        require_kind(folder, "sparse")


def test_finding(folder: Path, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    lines = checkpoint.list_checkpoints(tmp_path)
    assert list(lines) == ["dense", "routed"]
    assert lines["routed"] == "routed dit, random numbers, 4 steps, FID 12.5"
    (folder / "card.json").write_text("{")
    assert checkpoint.list_checkpoints(tmp_path)["routed"].startswith("unreadable")
    monkeypatch.setattr(layout, "checkpoints_root", lambda: tmp_path)
    assert checkpoint.resolve("dense") == dense_folder
    assert checkpoint.resolve(str(dense_folder)) == dense_folder
    assert checkpoint.resolve("facebook/DiT-XL-2-256") == "facebook/DiT-XL-2-256"
    with pytest.raises(DiffratioError, match="unknown checkpoint 'dens': did you mean dense"):
        checkpoint.resolve("dens")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffratioError, match="'empty/typo' is missing"):  # not taken for a hub id
        checkpoint.resolve("empty/typo")


def test_an_old_class_name_is_understood(dense_folder: Path) -> None:
    config = dense_folder / "transformer/config.json"
    changes = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert torch.equal(outputs(diffratio.load_transformer(dense_folder)), outputs(dense()))


def test_what_ships_loads() -> None:
    names = checkpoint.list_checkpoints()
    assert names
    for name in names:
        transformer = diffratio.load_transformer(name)
        card = read_card(checkpoint.resolve(name))
        assert is_applied(transformer) == (card.kind == "routed")
        parameters = sum(value.numel() for value in transformer.parameters())
        assert f"| parameters | {parameters:,} |" in Path(checkpoint.resolve(name), "README.md").read_text()


def test_a_skeleton_has_the_shapes_and_no_weights(tmp_path: Path) -> None:
    transformer = get_backbone("dit").tiny()
    folder = checkpoint.export(transformer, tmp_path / "dense")
    skeleton = checkpoint.load_skeleton(folder)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {
        k: v.shape for k, v in transformer.state_dict().items()
    }
