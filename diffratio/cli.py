"""The command line: each verb is a function; heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from diffratio import __version__
from diffratio.errors import DiffratioError, ReportedElsewhere, Terminated, in_one_line, speaks, unknown
from diffratio.files import configs_folder

# of a name that was given: too long, a folder, below a file, a loop of links, not for this user
_BAD_PATHS = (errno.ENAMETOOLONG, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
KINDS = ("methods", "backbones", "data", "experiments", "checkpoints")


@dataclass(frozen=True)
class Answer:
    """What a verb found.

    Args:
        document: plain data, printed with `--json`.
        text: the same for reading; None prints the document as YAML.
        code: exit code.
    """

    document: Any
    text: str | None = None
    code: int = 0


def experiments() -> dict[str, str]:
    """Name and first comment line of every experiment."""
    found = {}
    for path in sorted((configs_folder() / "experiment").glob("*.yaml")):
        lines = (line.lstrip("# ").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
        found[path.stem] = next((line for line in lines if line and not line.startswith("@")), "")
    return found


def _list(kind: str) -> dict[str, str]:
    if kind == "methods":
        from diffratio.catalog import METHODS

        return {name: line for name, (_, line) in METHODS.items()}
    if kind == "backbones":
        from diffratio.catalog import FAMILIES

        return {name: line for name, (_, _, line) in FAMILIES.items()}
    if kind == "data":
        from diffratio.data.registry import embedded_sets

        return embedded_sets()
    if kind == "checkpoints":
        from diffratio.checkpoint import list_checkpoints

        return list_checkpoints()
    return experiments()


def ls(args: argparse.Namespace) -> Answer:
    """What there is to choose from."""
    if args.kind is not None and args.kind not in KINDS:
        raise unknown("kind of thing to list", args.kind, KINDS)
    found = {kind: _list(kind) for kind in ([args.kind] if args.kind else KINDS)}
    lines: list[str] = []
    for kind, members in found.items():
        width = max(map(len, members), default=0)
        lines += [f"{kind}:", *(f"  {name:{width}}  {line}".rstrip() for name, line in members.items())]
        lines += [] if members else ["  none"]
    return Answer(found, "\n".join(lines))


def show(args: argparse.Namespace) -> Answer:
    """An experiment's composed config, or a checkpoint's card."""
    known = experiments()
    if args.name in known:
        from omegaconf import OmegaConf

        from diffratio.training.run import compose

        config = compose("train", [f"experiment={args.name}"])
        return Answer(OmegaConf.to_container(config, resolve=False), OmegaConf.to_yaml(config))
    from diffratio.checkpoint import checkpoints_root, list_checkpoints, read_card

    place, root = Path(args.name), checkpoints_root()
    if not place.is_dir() and root is not None and "/" not in args.name:
        place = root / args.name
    if not place.is_dir():
        raise unknown("experiment or checkpoint", args.name, [*known, *list_checkpoints()])
    return Answer(read_card(place).to_json())


def check(args: argparse.Namespace) -> Answer:
    """Composes and validates an experiment, builds it without weights and says what it will cost."""
    from diffratio.training.run import check, compose

    return Answer(check(compose("train", [_experiment(args), *args.overrides]), args.map, args.verify))


def _experiment(args: argparse.Namespace) -> str:
    name = str(args.experiment)
    return name if "=" in name else f"experiment={name}"


def measure(args: argparse.Namespace) -> Answer:
    """Measures what each block, region and bin does to a dense model's output: schedules without training."""
    from diffratio.training.run import compose, measure

    cfg = compose("train", [_experiment(args), *args.overrides])

    from diffratio.sensitivity import MeasureSettings

    named = ("n", "regions", "lowest", "samples", "ranking", "seed")
    settings = MeasureSettings(**{name: getattr(args, name) for name in named if getattr(args, name) is not None})
    return Answer(measure(cfg, args.out, settings))


def train(args: argparse.Namespace) -> Answer:
    """Trains."""
    from diffratio.training.run import compose, train

    return Answer(train(compose("train", args.overrides)))


def compare(args: argparse.Namespace) -> Answer:
    """Compares methods on the same backbone, seeds and budget; a rerun does what is missing."""
    from diffratio.training.run import compose, plain_config

    cfg = plain_config(compose("compare", args.overrides))
    if args.dry_run:
        cfg["dry_run"] = True

    from diffratio.data import open_data
    from diffratio.data.latents import LatentData
    from diffratio.evaluation.compare import CompareSettings, Latents, compare_from_config, plan_text

    settings = CompareSettings.from_config(cfg)  # before any training
    trained = _trained_arms(cfg, settings.to_train, settings.dry_run) if settings.train else []
    data, latents = open_data(cfg["data"]), None
    held_out, reference = data.held_out, data.reference
    if isinstance(data, LatentData):
        latents = Latents(data.held_out, data.check_pipeline)
        held_out, reference = data.held_out_pictures, data.reference_pictures
    document = compare_from_config(cfg, held_out, trained, reference, data.conditions, latents)
    return Answer(document, plan_text(document["plan"]) if "plan" in document else None)


def _trained_arms(cfg: Mapping[str, Any], methods: Sequence[str], dry_run: bool) -> list[Any]:
    """Trains the arms of a comparison first; with `dry_run` those not trained yet have no folder."""
    from diffratio.evaluation.compare import TrainedArm
    from diffratio.training.arms import arm_runs, train_arms

    runs = arm_runs(cfg, methods)
    unfinished = [run for run in runs if not run.finished]
    if unfinished and not dry_run:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DiffratioError(
                f"train=true has {len(unfinished)} arms to train, which it does in one process: run the same command "
                "once without accelerate launch, then it goes on with any number"
            )
        train_arms(runs)
    return [TrainedArm(run.name, run.budget, run.seed, str(run.export) if run.finished else None) for run in runs]


def precompute(args: argparse.Namespace) -> Answer:
    """Encodes pictures and captions once: latents and text states in shards, for `data=precomputed`."""
    from diffratio.training.run import compose, plain_config

    cfg = plain_config(compose("precompute", args.overrides))

    from diffratio.data.precompute import in_words, precompute

    document = precompute(cfg)
    return Answer(document, in_words(document))


def bench(args: argparse.Namespace) -> Answer:
    """Times routing, training, methods or sampling against the dense model and peers; or makes a cost table."""
    from diffratio.bench.settings import expanded
    from diffratio.training.run import compose, plain_config

    cfg = plain_config(compose("bench", expanded(args.kind, args.overrides)))

    from diffratio.bench.run import run_bench

    found = run_bench(args.kind, cfg)
    return Answer(found.document, found.text)


def search(args: argparse.Namespace) -> Answer:
    """Searches step schedules for a dense model, error against MACs; a rerun does what is missing."""
    from diffratio.training.run import compose, plain_config

    cfg = plain_config(compose("search", args.overrides))

    from diffratio.search import search

    return Answer(*search(cfg))


def export(args: argparse.Namespace) -> Answer:
    """Writes a training run as a checkpoint folder."""
    from diffratio.training.run import export_run

    return Answer(export_run(args.run, args.out, args.dtype, args.adapter))


def sample(args: argparse.Namespace) -> Answer:
    """Samples pictures from a checkpoint into a PNG grid."""
    from diffratio.cli_sample import sampled

    return Answer(*sampled(args))


def doctor(args: argparse.Namespace) -> Answer:
    """Versions, devices, what is installed and what is missing for what."""
    from diffratio.doctor import describe, examine

    found = examine()
    return Answer(found, describe(found), 0 if found["ok"] else 1)


class _Parser(argparse.ArgumentParser):
    """Answers a wrong word with one line, as every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise DiffratioError(f"{message}; `{self.prog} --help` says what there is")


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    # no defaults here: those of a verb would overwrite what was given before it
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else there")
    common.add_argument("--debug", action="store_true", help="tracebacks (also DIFFRATIO_DEBUG=1)")
    main_parser = _Parser("diffratio", description="Cheaper diffusion transformers.", parents=[common])
    main_parser.add_argument("--version", action="version", version=f"diffratio {__version__}")
    verbs = main_parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function: Callable[[argparse.Namespace], Answer]) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        one = verbs.add_parser(function.__name__, parents=[common], help=text, description=text)
        one.set_defaults(function=function)
        return one

    def overrides(one: argparse.ArgumentParser) -> None:
        one.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")

    verb(ls).add_argument("kind", nargs="?", metavar="|".join(KINDS))
    verb(show).add_argument("name", metavar="NAME")
    one = verb(check)
    one.add_argument("experiment", metavar="EXPERIMENT")
    one.add_argument("--map", metavar="FILE", help="sensitivity map: predicts what the budget costs in quality")
    one.add_argument(
        "--verify", type=int, default=0, metavar="N", help="measures those predictions on N held-out images (minutes)"
    )
    overrides(one)
    one = verb(measure)
    one.add_argument("experiment", metavar="EXPERIMENT", help="whose backbone, data, objective and run are measured")
    one.add_argument("--out", required=True, metavar="FILE.safetensors", help="sensitivity map to write")
    one.add_argument("--n", type=int, help="images (default 256)")
    one.add_argument("--regions", type=int, help="noise-level regions (default 4)")
    one.add_argument("--lowest", type=float, help="budget at which the path ends (default 0.5)")
    one.add_argument(
        "--samples", type=int, help="images whose final distance weighs the regions; 0 (default) weighs them alike"
    )
    one.add_argument("--ranking", help="training-free ranking of the tokens (default strided)")
    one.add_argument("--seed", type=int)
    overrides(one)
    overrides(verb(train))
    overrides(verb(precompute))
    one = verb(sample)
    one.add_argument("folder", metavar="FOLDER", help="checkpoint folder, name of one that ships, or hub id")
    one.add_argument("--n", type=int, help="number of pictures (default 40, or one a prompt)")
    one.add_argument("--labels", metavar="A,B,C", help="class names or numbers, in turn; default: all classes in turn")
    one.add_argument(
        "--prompts", nargs="+", metavar="TEXT", help="texts in turn, or a .txt file with one a line (text-to-image)"
    )
    one.add_argument("--image", nargs="+", metavar="FILE", help="pictures to fill, in turn (default: held-out ones)")
    one.add_argument(
        "--mask", metavar="FILE|boxes|strokes|mixed", help="white where the hole is, or a shape; default: the card's"
    )
    one.add_argument("--parts", metavar="FOLDER", help="dense pipeline that has the text encoder and VAE it lacks")
    one.add_argument("--steps", type=int, help="sampling steps; default: the card's")
    one.add_argument("--guidance", type=float, help="classifier-free guidance; default: the card's")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--batch-size", type=int, default=64)
    one.add_argument("--device", help="default: cuda where there is one, else cpu")
    one.add_argument("--out", default="samples.png", metavar="FILE.png", help="picture grid (default samples.png)")
    one.add_argument("--npz", metavar="FILE.npz", help="also the pictures as an array")
    one = verb(compare)
    one.add_argument("--dry-run", action="store_true", help="print the plan (arms, costs, time) and write nothing")
    overrides(one)
    one = verb(bench)
    one.add_argument("kind", metavar="routing|training|methods|sampling|table")
    overrides(one)
    overrides(verb(search))
    one = verb(export)
    one.add_argument("run", metavar="RUN", help="run folder")
    one.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint folder to write")
    storage = ("float32", "float16", "bfloat16")
    one.add_argument("--dtype", choices=storage, help="storage of the weights; routers stay float32")
    one.add_argument("--adapter", action="store_true", help="of a LoRA run: LoRA, routers and schedule alone")
    verb(doctor)
    return main_parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone does not allow."""
    main_parser = parser()
    args, rest = main_parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides, rest = [*args.overrides, *rest], []
    if rest:
        main_parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.json, args.debug = getattr(args, "json", False), getattr(args, "debug", False)
    return args


def _plain(value: Any) -> Any:
    """Strict JSON: no NaN, no paths, no arrays."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(answer.document), indent=1, allow_nan=False))
    elif answer.text is not None:
        print(answer.text)
    else:
        import yaml

        print(yaml.safe_dump(_plain(answer.document), sort_keys=False, allow_unicode=True, width=120).rstrip())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: words after the program's name; None takes the process's.

    Returns:
        0 on success, 2 on bad input, 1 on failure, 130 when interrupted, 143 when terminated.
    """
    debug = os.environ.get("DIFFRATIO_DEBUG", "") not in ("", "0")
    try:
        args = _parse(argv)
        debug = debug or args.debug
        quiet = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
        with quiet, _terminable():
            answer = args.function(args)
        if speaks():
            _print(answer, args.json)
        sys.stdout.flush()
        return int(answer.code)
    except SystemExit as stop:  # argparse: 0 after --help, 2 on a wrong word
        return stop.code if isinstance(stop.code, int) else 1
    except Terminated as stop:
        if speaks():
            print(f"diffratio: {str(stop) or 'terminated'}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("diffratio: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone; Python must not complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, DiffratioError) else f"{type(error).__name__}: "
        if not isinstance(error, ReportedElsewhere):  # one of several processes says it
            print(f"diffratio: {in_one_line(f'{kind}{error}')}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is not None and error.errno in _BAD_PATHS:
            return DiffratioError.exit_code
        return error.exit_code if isinstance(error, DiffratioError) else 1
