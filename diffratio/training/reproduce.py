"""The command that makes a run again: what its settings differ in from those of its experiment."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from diffratio.errors import DiffratioError
from diffratio.files import configs_folder
from diffratio.training.run import compose, composed

_GROUPS = ("backbone", "method", "objective", "data")  # whose members carry the name of their file, mostly
_OPTIONAL = {"lora": "rank", "inpaint": "mask"}  # group -> the key that is null in its member `none`
# where a run lies, what watches it and where it runs decide nothing about what is learned
_LEFT_OUT = re.compile(
    r"name|ckpt_path|(paths|logger)\..*|callbacks\.(checkpoint|pictures|ratios)_.*|trainer\.(accelerator|devices"
    r"|num_nodes|strategy|precision|log_every_n_steps|enable_.*|profiler|detect_anomaly|max_time|num_sanity_val_steps)"
)
_PLAIN = re.compile(r"[A-Za-z_./~][\w./~-]*")  # a word that Hydra takes without quotes


def command(plain: Mapping[str, Any], steps: int | None = None) -> str:
    """`diffratio train ...` with the experiment of a run and what was set beside it.

    Args:
        plain: resolved settings of the run.
        steps: that were trained, where fewer than were asked for.
    """
    try:
        return _command(plain, steps)
    except DiffratioError:  # its configs are no longer what they were; an export does not end by that
        return shlex.join(["diffratio", "train", f"experiment={plain['name']}", f"seed={plain['seed']}"])


def _command(plain: Mapping[str, Any], steps: int | None) -> str:
    plain = {**plain, "trainer": {**plain["trainer"]}}
    if steps and steps < plain["trainer"]["max_steps"]:
        plain["trainer"]["max_steps"] = steps
    words = [f"seed={plain['seed']}"]
    if (configs_folder() / "experiment" / f"{plain['name']}.yaml").is_file():
        words.insert(0, f"experiment={plain['name']}")
    base = composed(compose("train", words))
    for group in _GROUPS:
        name = plain[group]["name"]
        if name != base[group]["name"] and (configs_folder() / group / f"{name}.yaml").is_file():
            words.append(f"{group}={name}")
    for group, key in _OPTIONAL.items():
        own, usual = (one.get(group, {}).get(key) for one in (plain, base))
        if (own is None) != (usual is None):
            words.append(f"{group}={'none' if own is None else 'default'}")
    words += _differences(plain, composed(compose("train", words)))
    return shlex.join(["diffratio", "train", *words])


def _differences(own: Mapping[str, Any], base: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(own.keys() | base.keys()):
        name = f"{prefix}{key}"
        if _LEFT_OUT.fullmatch(name):
            continue
        if key not in own:
            yield f"~{name}"
        elif isinstance(own[key], Mapping) and isinstance(base.get(key), Mapping):
            yield from _differences(own[key], base[key], f"{name}.")
        elif key not in base or own[key] != base[key]:
            yield f"{'' if key in base else '+'}{name}={_said(own[key])}"


def _said(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_said(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_said, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return repr(value)
    if _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'"
