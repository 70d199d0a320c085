"""The command line: exit codes, what goes to which stream, and each verb on real folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffratio
from diffratio import checkpoint, cli
from diffratio.backbones import get_backbone
from diffratio.cli import main
from diffratio.cost.run import uniform_run
from diffratio.errors import DiffratioError
from diffratio.routing.schedule import KeepSchedule
from diffratio.tokens.grid import TokenGrid

TINY = [
    "experiment=fashion_pretrain",
    "debug=cpu",
    "data.source=fashion_mnist",
    "trainer.max_steps=2",
    "backbone.config.num_layers=2",
    "backbone.config.num_attention_heads=2",
    "backbone.config.attention_head_dim=8",
]


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracebacks only where a test asks for them."""
    monkeypatch.delenv("DIFFRATIO_DEBUG", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny routed checkpoint."""
    schedule = KeepSchedule(((10, 10), (5, 3), (2, 7)), uniform_run(3, TokenGrid(4, 4)))
    transformer = diffratio.apply_(get_backbone("dit").tiny(), diffratio.DiffCR(schedule=schedule))
    card = {"class_names": list("abcdefghij"), "sampler": {"steps": 3, "guidance_scale": 1.5}}
    return checkpoint.export(transformer, tmp_path / "routed", card=card)


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """Standard output, which must be one JSON document."""
    return json.loads(capsys.readouterr().out)


def test_ls_lists_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--json"]) == 0
    found = document(capsys)
    assert list(found) == list(cli.KINDS)
    assert {"dense", "diffcr", "tome"} <= set(found["methods"])
    assert "dit" in found["backbones"] and "fashion_mnist" in found["data"]
    for name, line in found["experiments"].items():
        assert line.startswith((f"diffratio train experiment={name}", f"diffratio check {name}"))
    assert main(["ls", "methods"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("methods:\n") and "  tome " in out and "backbones" not in out


def test_every_listed_method_and_backbone_exists() -> None:
    from diffratio.methods import get_method, methods

    assert cli._list("methods") == methods()
    for name in methods():
        assert get_method(name).name == name
    for name in cli._list("backbones"):
        assert get_backbone(name).name == name


def test_listing_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom diffratio.cli import main\ncode = main(['ls', '--json'])\n"
        "heavy = {'torch', 'numpy', 'lightning', 'diffusers', 'hydra', 'omegaconf', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    package = Path(diffratio.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=package, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"]


def test_module_runs_as_a_program() -> None:
    package = Path(diffratio.__file__).parent.parent
    command = [sys.executable, "-m", "diffratio"]
    done = subprocess.run([*command, "ls", "queues"], cwd=package, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("diffratio: unknown kind of thing to list 'queues': known are backbones, ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ls", "method"], "did you mean methods"),
        (["show", "fashion_difcr"], "did you mean fashion_diffcr"),
        (["show", "fashion_difcr", "--json"], "did you mean fashion_diffcr"),
        (["check", "fashion_difcr"], "fashion_diffcr"),
        (["train", "trainer.max_step=3"], "did you mean trainer.max_steps"),
        (["train", "nonsense"], "write key=value"),
        (["sample", "nowhere"], "unknown checkpoint 'nowhere'"),
        (["sample", "x", "--out", "x.jpg"], "ends in .png"),
        (["sample", "x", "--labels", "1,,2"], "empty name"),
        (["sample", "x", "--n", "0"], "--n must be at least 1"),
        (["export", "nowhere", "--out", "x"], "no run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("diffratio: ") and message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["fly"], ["ls", "--fast"], ["export", "run"], ["sample"], ["ls", "data", "more"]])
def test_wrong_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "--help` says what there is" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["sample", "--help"]])
def test_help_is_exit_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "diffratio" in capsys.readouterr().out


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `ls` fail."""

    def broken(kind: str) -> dict[str, str]:
        print("chatter")
        raise error

    monkeypatch.setattr(cli, "_list", broken)


def test_failure_is_exit_1_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, RuntimeError("disk\n  full"))
    assert main(["ls", "--json"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "chatter\ndiffratio: RuntimeError: disk full\n")


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("disk full"), 1), (DiffratioError("bad"), 2)])
@pytest.mark.parametrize("how", ["after", "before", "environment"])
def test_debug_shows_the_traceback(
    how: str, error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, error)
    if how == "environment":
        monkeypatch.setenv("DIFFRATIO_DEBUG", "1")
    argv = {"after": ["ls", "--debug"], "before": ["--debug", "ls"], "environment": ["ls"]}[how]
    assert main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("diffratio: ")


def test_interrupted_is_exit_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, KeyboardInterrupt())
    assert main(["ls"]) == 130
    assert capsys.readouterr().err == "diffratio: interrupted\n"


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"a": float("nan"), "b": (1, Path("x")), 3: torch.tensor([1.5, float("inf")]), "d": np.float32(0.5)}
    cli._print(cli.Answer(values), as_json=True)
    assert document(capsys) == {"a": None, "b": [1, "x"], "3": [1.5, None], "d": 0.5}


def test_overrides_may_stand_around_options() -> None:
    args = cli._parse(["train", "a=1", "--json", "b=2", "~c"])
    assert args.overrides == ["a=1", "b=2", "~c"] and args.json and not args.debug
    args = cli._parse(["--json", "check", "mine", "a=1", "--debug"])
    assert (args.experiment, args.overrides, args.json, args.debug) == ("mine", ["a=1"], True, True)


def test_show_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "fashion_diffcr", "--json"]) == 0
    config = document(capsys)
    assert config["name"] == "fashion_diffcr" and config["method"]["name"] == "diffcr"
    assert main(["show", "fashion_diffcr"]) == 0
    assert "name: fashion_diffcr" in capsys.readouterr().out


def test_show_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(folder), "--json"]) == 0
    assert document(capsys) == json.loads((folder / "card.json").read_text())
    assert main(["show", str(folder)]) == 0
    assert "kind: routed" in capsys.readouterr().out


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "fashion_diffcr", "backbone=dit_fashion", "backbone.config.num_layers=2", "--json"]
    assert main(argv) == 0
    found = document(capsys)
    assert found["layers"] == 2 and found["budget"]["target"] == 0.8
    assert main([*argv, "budget.target=0.01"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "budget.target=0.01" in captured.err


def test_sample(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, npz = tmp_path / "new" / "grid.png", tmp_path / "new" / "images.npz"
    argv = ["sample", str(folder), "--n", "12", "--out", str(out), "--npz", str(npz), "--device", "cpu", "--json"]
    assert main(argv) == 0
    found = document(capsys)
    assert (found["steps"], found["guidance"], found["n"], found["out"]) == (3, 1.5, 12, str(out))
    first = np.load(npz)["arr_0"]
    assert first.shape == (12, 8, 8, 1) and first.dtype == np.uint8
    width, height = Image.open(out).size
    assert width / height == pytest.approx((10 * 9 - 1) / (2 * 9 - 1))  # two rows of ten, lines between
    assert main(argv) == 0
    assert (np.load(npz)["arr_0"] == first).all()
    assert main([*argv, "--seed", "1"]) == 0
    assert (np.load(npz)["arr_0"] != first).any()
    assert main([*argv, "--steps", "2", "--guidance", "1", "--labels", "c,4"]) == 0
    capsys.readouterr()
    assert (np.load(npz)["arr_0"] != first).any()


def test_sample_labels_are_taken_in_turn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz = [tmp_path / f"{i}.npz" for i in range(2)]
    argv = ["sample", str(folder), "--n", "4", "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert main([*argv, "--labels", "c,4", "--npz", str(npz[0])]) == 0
    assert main([*argv, "--labels", "2,e,2,e", "--npz", str(npz[1])]) == 0
    assert (np.load(npz[0])["arr_0"] == np.load(npz[1])["arr_0"]).all()
    assert "4 samples in 3 steps" in capsys.readouterr().out
    assert main([*argv, "--labels", "k"]) == 2
    assert "unknown class 'k'" in capsys.readouterr().err
    assert main([*argv[:-1], "tpu9"]) == 2
    assert "--device 'tpu9' is not available" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffratio import doctor

    assert main(["doctor", "--json"]) == 0
    found = document(capsys)
    assert found["ok"] and found["required"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["devices"]["cpu cores"] and found["folders"]["temporary files (TMPDIR)"]["writable"]
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("scipy", "lightning") else installed(name))
    assert main(["doctor"]) == 1  # lightning is required, scipy is not
    out = capsys.readouterr().out
    assert "pip install 'diffratio[metrics]'" in out and "MISSING" in out
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "scipy" else installed(name))
    assert main(["doctor"]) == 0


@pytest.mark.slow  # tests/e2e/test_way.py goes the same way in processes of its own
def test_train_export_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", *TINY, f"paths.output_dir={run}", "--json"]) == 0
    result = document(capsys)
    assert result["steps"] == 2 and Path(result["export"]).is_dir()
    assert main(["train", *TINY, f"paths.output_dir={run}"]) == 2
    assert "ckpt_path=last" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(out), "--dtype", "float16", "--json"]) == 0
    assert document(capsys)["steps"] == 2
    assert checkpoint.checkpoint_kind(out) == "dense"
    argv = ["sample", str(out), "--n", "2", "--steps", "2", "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert main(argv) == 0
    assert (tmp_path / "x.png").is_file()
