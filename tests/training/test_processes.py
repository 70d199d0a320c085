"""One process, two under DDP, two under FSDP2 and two nodes are one and the same job at an equal global batch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from resuming import metrics
from safetensors.torch import load_file
from tiny_run import checkpoint_of, column, job, rows_of, train_tiny

from diffratio.errors import DiffratioError
from diffratio.files import read_json

# a mean over two halves differs from one over all in its last bits, which Adam enlarges where gradients are near zero
LOSS, WEIGHT = 2e-4, 2e-4
DDP = ["trainer.strategy=ddp", "trainer.devices=2", "data.batch_size=4"]
FSDP = ["trainer.strategy=fsdp2", "trainer.devices=2", "data.batch_size=4"]
NODES = ["trainer.devices=1", "trainer.num_nodes=2", "data.batch_size=4"]
Straight = Callable[[int], Path]


def run_of(data: Path, folder: Path, *overrides: str, **options: Any) -> Path:
    """Trains in two processes that must all end well."""
    run = folder / "run"
    ends = launch(job(data, run, *overrides), folder, **options)
    assert [code for code, _ in ends] == [0, 0], ends
    return run


def assert_same_job(run: Path, whole: Path, weight: float = WEIGHT) -> None:
    """The same schedule, budget and step count; losses, ratios and exported weights within rounding."""
    found, expected = read_json(run / "result.json", "result"), read_json(whole / "result.json", "result")
    for key in ("schedule", "macs_fraction", "budget_fraction", "steps"):
        assert found[key] == expected[key], key
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=LOSS)
    for name in ("train/diffusion_loss", "train/grad_norm", "ratios/budget"):
        assert column(run, name) == pytest.approx(column(whole, name), rel=LOSS), name
    for row, other in zip(rows_of(run / "ratios.csv"), rows_of(whole / "ratios.csv"), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, abs=LOSS)
    assert_same_export(run, whole, weight)


def assert_same_export(run: Path, whole: Path, weight: float = WEIGHT) -> None:
    files = [sorted((one / "export").rglob("*.safetensors")) for one in (run, whole)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] != []
    for path, other in zip(*files, strict=True):
        own, expected = load_file(path), load_file(other)
        assert own.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(own[key], expected[key], atol=weight, rtol=0, msg=key)


def test_two_processes_train_as_one(data: Path, tmp_path: Path, straight: Straight) -> None:
    run = run_of(data, tmp_path, *DDP, hook=("as_on_gpus",))
    assert_same_job(run, straight(1))
    assert checkpoint_of(run)["state_dict"].keys() == checkpoint_of(straight(1))["state_dict"].keys()


def test_two_sharded_processes_train_as_one(data: Path, tmp_path: Path, straight: Straight) -> None:
    """The moving average too, which the export holds; the checkpoint is the file that one process writes."""
    run = run_of(data, tmp_path, *FSDP, hook=("as_on_gpus",))
    assert_same_job(run, straight(1))
    own, expected = checkpoint_of(run), checkpoint_of(straight(1))
    assert own["state_dict"].keys() == expected["state_dict"].keys()
    for part in ("optimizer_states", "callbacks"):
        assert shapes(own[part]) == shapes(expected[part]), part
    assert list((run / "pictures").glob("*.png")) and rows_of(run / "logs" / "metrics.csv")


def shapes(document: Any) -> Any:
    """Nested data with the shape of every tensor in its place."""
    if isinstance(document, torch.Tensor):
        return tuple(document.shape)
    if isinstance(document, dict):
        return {key: shapes(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [shapes(value) for value in document]
    return type(document)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_once_and_one_process_goes_on(
    data: Path, tmp_path: Path, straight: Straight
) -> None:
    """Under FSDP2, to the second process; a single one takes the rest."""
    run = tmp_path / "run"
    ends = launch(job(data, run, *FSDP), tmp_path, hook=("terminate", 1, 2, int(signal.SIGTERM)))
    assert [code for code, _ in ends] == [143, 143], ends
    assert "terminated, the state is saved in" in ends[0][1] and not ends[1][1], ends
    assert checkpoint_of(run)["global_step"] == 3 and not (run / "checkpoints" / "last.prev.ckpt").exists()
    train_tiny(data, run, "ckpt_path=last")
    assert_same_job(run, straight(1))


@pytest.mark.slow
def test_two_nodes_train_as_one(data: Path, tmp_path: Path, straight: Straight) -> None:
    run = run_of(data, tmp_path, *NODES, per_node=1)
    assert_same_job(run, straight(1))


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("first", "then"), [(DDP, DDP), (DDP, FSDP), (FSDP, FSDP), ([], DDP)], ids=["ddp", "ddp-fsdp", "fsdp", "one-ddp"]
)
def test_k_and_k_steps_are_two_k(
    data: Path, tmp_path: Path, straight: Straight, first: list[str], then: list[str], sign: int
) -> None:
    run, hook = tmp_path / "run", ("terminate", 0, 5, int(sign))  # after the freeze
    ends = launch(job(data, run, *first), tmp_path, world=2 if first else 1, hook=hook)
    assert {code for code, _ in ends} == {143}, ends
    run_of(data, tmp_path, *then, "ckpt_path=last")
    assert_same_job(run, straight(1))


@pytest.mark.slow
def test_ddp_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole = run_of(data, tmp_path / "whole", *DDP)
    folder = tmp_path / "cut"
    ends = launch(job(data, folder / "run", *DDP), folder, hook=("terminate", 1, 3, int(signal.SIGTERM)))
    assert {code for code, _ in ends} == {143}
    run = run_of(data, folder, *DDP, "ckpt_path=last")
    assert metrics(run) == metrics(whole)
    assert_same_export(run, whole, weight=0)


@pytest.mark.slow
@pytest.mark.parametrize("timesteps", ["iid", "one_region"])
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_accumulated_and_regional_batches(data: Path, tmp_path: Path, strategy: list[str], timesteps: str) -> None:
    """Two processes with two micro-batches of 2 are one with a batch of 8, but where a draw belongs to a micro-batch.

    There, one process with two micro-batches of 4 is meant.
    """
    settings = [f"objective.timesteps={timesteps}", "method=diffcr"]
    alone = [] if timesteps == "iid" else ["trainer.accumulate_grad_batches=2", "data.batch_size=4"]
    train_tiny(data, tmp_path / "one", *settings, *alone)
    split = [*strategy, "data.batch_size=2", "trainer.accumulate_grad_batches=2"]
    run = run_of(data, tmp_path, *settings, *split)
    found, expected = (read_json(one / "result.json", "result") for one in (run, tmp_path / "one"))
    assert found["schedule"] == expected["schedule"]
    assert column(run, "train/grad_norm") == pytest.approx(column(tmp_path / "one", "train/grad_norm"), rel=LOSS)
    assert_same_export(run, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "settings",
    [
        ["objective.distill=0.5"],
        ["lora=default", "lora.rank=2"],
        ["method=mod"],
        ["method=dense", "backbone.gradient_checkpointing=true"],
    ],
    ids=["teacher", "lora", "mod", "checkpointing"],
)
def test_what_else_is_trained(data: Path, tmp_path: Path, strategy: list[str], settings: list[str]) -> None:
    if "lora=default" in settings:
        pytest.importorskip("peft")
    train_tiny(data, tmp_path / "one", *settings, "trainer.max_steps=4")
    run = run_of(data, tmp_path, *strategy, *settings, "trainer.max_steps=4")
    name = "train/distill_loss" if "objective.distill=0.5" in settings else "train/diffusion_loss"
    assert column(run, name) == pytest.approx(column(tmp_path / "one", name), rel=LOSS)
    assert_same_export(run, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("answer", ["skip", "stop"])
def test_a_bad_sample_of_one_process_is_everybodys(
    data: Path, tmp_path: Path, strategy: list[str], answer: str
) -> None:
    """Position 22 is in the third batch of 8, in the half of the second process."""
    run, settings = tmp_path / "run", ["method=mod", "trainer.max_steps=5", f"callbacks.nonfinite={answer}"]
    ends = launch(job(data, run, *strategy, *settings), tmp_path, hook=("poison", 22))
    if answer == "stop":
        assert [code for code, _ in ends] == [1, 1], ends
        assert "not finite at step 2 (samples 22 of the stream" in ends[0][1] or "nan at step 2" in ends[0][1], ends
        assert "samples 22 of the stream, rows" in ends[0][1] and not ends[1][1], ends
        return
    assert [code for code, _ in ends] == [0, 0], ends
    assert list(column(run, "train/skipped_steps").values()) == [0, 0, 1, 1, 1]


@pytest.mark.slow
def test_another_schedule_on_one_process_is_an_error(data: Path, tmp_path: Path) -> None:
    ends = launch(job(data, tmp_path / "run", *DDP), tmp_path, hook=("part_ways",))
    assert [code for code, _ in ends] == [1, 1], ends
    assert "the keep schedule of process 1 differs from that of process 0" in ends[0][1]
    assert not (tmp_path / "run" / "export").exists() and not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_pictures_that_do_not_divide(data: Path, tmp_path: Path) -> None:
    """200 pictures, 60 held out: neither is a multiple of 2 x 7, and every process must see equally many batches."""
    for strategy in (DDP, FSDP):
        settings = ["data.batch_size=7", "trainer.limit_val_batches=1.0", "trainer.max_steps=32"]
        run = run_of(data, tmp_path / strategy[0].split("=")[-1], *strategy, *settings, "trainer.val_check_interval=16")
        assert read_json(run / "result.json", "result")["steps"] == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.strategy=fsdp"], "unknown trainer.strategy 'fsdp': did you mean fsdp2"),
        (["trainer.devices=4096"], "trainer.devices=4096 asks for more processes than the"),
        (["trainer.num_nodes=2"], "nothing has started the processes of the other nodes"),
        (
            ["trainer.strategy=fsdp2", "trainer.precision=16-mixed"],
            "takes trainer.precision=32-true or bf16-mixed",
        ),
        (["trainer.strategy=fsdp2", "optimizer.kind=adamw_8bit"], "does not go with trainer.strategy=fsdp2"),
        (["trainer.precision=16-mixed", "optimizer.kind=fused"], "gradients that are still scaled"),
    ],
)
def test_what_does_not_go_is_one_line(data: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(DiffratioError, match=message) as caught:
        train_tiny(data, tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
