"""What the README tells a new user to type really runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from diffratio import cli
from diffratio.training.run import compose, plain_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("diffratio ")
]


def test_there_are_commands_and_the_two_targets() -> None:
    assert len(COMMANDS) >= 6
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in README and re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] in ("ls", "check")], ids=" ".join)
def test_listing_and_checking_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] in ("train", "compare")], ids=" ".join)
def test_long_commands_compose(words: list[str]) -> None:
    assert plain_config(compose(words[0], words[1:]))["paths"]["output_dir"].startswith("runs/")


def test_the_demo_composes() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    makefile = makefile.replace("$(DEMO)", "demo").replace("$(EMOJI)", "emoji")
    found = re.findall(r"\$\(BIN\)/diffratio (train|compare) ([^;]*);", makefile)
    assert {verb for verb, _ in found} == {"train", "compare"}
    for verb, words in found:
        compose(verb, shlex.split(words))


def test_the_python_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    images = names["images"]
    assert isinstance(images, list) and len(images) == 2 and images[0].size == (32, 32)


def test_every_verb_of_the_table_exists() -> None:
    table = README.split("## Verbs")[1].split("## Methods")[0]
    verbs = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    for verb in verbs:
        assert cli.main([verb, "--help"]) == 0
