"""Every command and every piece of Python on the pages is run, in the order of the page, in a folder of its own.

What a page's commands are given in addition is in `ADDED`: options that make them short, nothing else. Of blocks that
are marked "not run", with the reason, the options are parsed: launcher, recipe and every field must be there.
"""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from pages import PAGES, README, ROOT, Block, blocks, examples

from benchmarks.study import __main__ as study
from benchmarks.study import timing
from benchmarks.study.conversion import ConversionConfig
from distill import cli
from distill.config import DistillConfig, SnnTrainingConfig

SHORT = [
    *("--data.max_train_samples", "64", "--data.max_eval_samples", "30"),
    *("--run.threads", "1", "--run.compile", "false", "--train.epochs", "1"),
]
ADDED = {
    "distill.py": [*SHORT, "--teacher_train.epochs", "1", "--teacher.min_top1", "0", "--eval_timesteps", "[1]"],
    "train_teacher.py": SHORT,
    "train_snn.py": [*SHORT, "--eval_timesteps", "[1]"],
    "export.py": ["--samples", "100", "--threads", "1"],
    "evaluate.py": [
        *("--data.max_train_samples", "64", "--data.max_eval_samples", "30"),
        *("--threads", "1", "--compile", "false"),
    ],
}
"""Options behind those of a page, by script."""

QUICK = ["docs/maths.md", "docs/python.md", "docs/tutorial.md"]
"""Pages that the default suite runs, in its own process; `-m slow` runs all of them as a user does."""

RUN = "runs/digits"
"""What the tutorial leaves, and other pages take for granted."""


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_commands(page: Path) -> bool:
    return any(block.language in ("bash", "python") and block.mark != "not run" for block in blocks(page))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder, in which the repository's own folders are found, as in a clone."""
    for name in ("scripts", "configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "SPIKESWAP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


# -- what a block of commands says ----------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block; bash itself reads it, with stand-ins that write down what they are given.

    Raises:
        AssertionError: for a command that is none of those, or does not end well.
    """
    names = ("accelerate", "python", "pip", "mkdocs", "sbatch")
    stand_ins = "".join(f'{name}() {{ printf "%s\\0" {name} "$@" ""; }}\n' for name in names)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"PATH=/none\n{stand_ins}{block.text}"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    found: list[list[str]] = [[]]
    for word in done.stdout.split("\0")[:-1]:
        if word:
            found[-1].append(word)
        else:
            found.append([])
    return found[:-1]


def script_of(command: list[str]) -> tuple[list[str], str | None, list[str]]:
    """What is in front of a script of this project, its name, and its options."""
    for index, word in enumerate(command):
        if re.fullmatch(r"scripts/\w+\.py", word):
            return command[:index], word.removeprefix("scripts/"), command[index + 1 :]
    return command, None, []


class Parsed(BaseException):
    """A script has read its command line."""


def parse_only(script: str, options: list[str], monkeypatch) -> None:
    """A script up to where its command line is read: a field or value that is not allowed ends it with status 2."""
    parse = cli.parse

    def stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(cli, "parse", stop)
        call(script, options)


def call(script: str, options: list[str]) -> None:
    """A script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()
    argv, path = sys.argv, list(sys.path)
    sys.argv = [f"scripts/{script}", *options]
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{script} {shlex.join(options)} ends with {end.code}"
    finally:
        sys.argv, sys.path[:] = argv, path


def check_launcher(words: list[str], rest: list[str]) -> None:
    """accelerate launch: its options are parsed, its configuration file read."""
    args = launch_command_parser().parse_args([*words, *rest])
    assert [args.training_script, *args.training_script_args] == rest
    if args.config_file is not None:
        load_config_from_file(args.config_file)


def check_study(module: str, options: list[str], monkeypatch) -> None:
    """python -m benchmarks.study, its timing or conversion: options and rows are read, and nothing is run."""
    if module == "benchmarks.study.timing":
        timing.parser().parse_args(options)
        return
    if module == "benchmarks.study.conversion":
        cli.parse(ConversionConfig, options)
        return
    assert module == "benchmarks.study", module

    def stop(*args, **kwargs):
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        for name in ("Place", "_table"):  # what is called once the rows are known
            patch.setattr(study, name, stop)
        study.main(options)


def check_command(command: list[str], monkeypatch) -> None:
    """What can be checked of a command without running it."""
    front, script, options = script_of(command)
    program, words = front[0], front[1:]
    if program == "pip":
        with (ROOT / "pyproject.toml").open("rb") as file:
            extras = tomllib.load(file)["project"]["optional-dependencies"]
        assert words[0] == "install"
        for name in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(name.split(",")) <= extras.keys()
    elif program == "accelerate":
        assert words[0] == "launch" and script is not None
        check_launcher(words[1:], [f"scripts/{script}", *options])
    elif program == "sbatch":
        assert words[-1] == "configs/accelerate/slurm.sh" and Path(words[-1]).is_file()
    elif words[:1] == ["-m"]:
        check_study(words[1], words[2:], monkeypatch)
    elif program == "mkdocs":
        assert words[0] in ("build", "serve")
    else:
        assert (program, words) == ("python", []), command
    if script is not None:
        parse_only(script, options, monkeypatch)


def write_files(page: Path, folder: Path) -> None:
    """Blocks with a title are files."""
    for block in blocks(page):
        if block.title is not None:
            (folder / block.title).write_text(block.text)


# -- running them ---------------------------------------------------------------------------------------------------


def run_page(page: Path, scratch: Path, run_block: Callable[[Block], None]) -> None:
    """The blocks of a page in order; its Python shares one namespace."""
    write_files(page, scratch)
    namespace: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.mark == "as in the README":  # what it installs is there
            own = [line for line in block.text.splitlines() if "scripts/" in line]
            block = replace(block, text="\n".join(own))
        elif block.mark is not None:
            continue
        if block.language == "bash":
            run_block(block)
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), namespace)


def in_this_process(block: Block) -> None:
    for command in commands(block):
        _, script, options = script_of(command)
        assert script is not None, f"{block.place}: {shlex.join(command)} is not a script of this project"
        call(script, [*options, *ADDED.get(script, [])])


def as_typed(block: Block) -> None:
    """In bash, with functions that put the added options behind those of the page."""
    cases = "".join(f"    scripts/{name}) more=({shlex.join(words)});;\n" for name, words in ADDED.items())
    add = f'added() {{\n  more=()\n  for word in "$@"; do case $word in\n{cases}  esac; done\n}}\n'
    for name in ("accelerate", "python"):
        add += f'{name}() {{ added "$@"; command {name} "$@" "${{more[@]}}"; }}\n'
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)  # what `pip install -e .` gives
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", add + block.text], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="session")
def tutorial_run(tmp_path_factory) -> Path:
    """What the tutorial's first command leaves."""
    folder = tmp_path_factory.mktemp("tutorial")
    before = Path.cwd()
    os.chdir(folder)
    try:
        call("distill.py", ADDED["distill.py"])
    finally:
        os.chdir(before)
    return folder / RUN


@pytest.mark.parametrize("page", [ROOT / name for name in QUICK], ids=page_id)
def test_the_commands_of_a_page_work(page, scratch):
    run_page(page, scratch, in_this_process)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if with_commands(page)], ids=page_id)
def test_the_commands_of_a_page_work_as_they_are_typed(page, scratch, request):
    if RUN in page.read_text() and page not in (README, ROOT / "docs" / "tutorial.md"):
        shutil.copytree(request.getfixturevalue("tutorial_run"), scratch / RUN)
    run_page(page, scratch, as_typed)


# -- the others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark for b in blocks(page))], ids=page_id)
def test_what_is_not_run_has_a_reason_and_options_that_exist(page, scratch, monkeypatch):
    write_files(page, scratch)
    contract = [block.text for block in blocks(README) if block.language == "bash"][:2]
    for block in blocks(page):
        if block.mark == "as in the README":
            assert block.text in contract
        elif block.mark is not None:
            assert block.language == "bash" and len(block.reason.split()) >= 2
            for command in commands(block):
                check_command(command, monkeypatch)


def test_examples_in_the_files_of_configs_have_options_that_exist(scratch, monkeypatch):
    files = [path for path in sorted((ROOT / "configs").rglob("*")) if path.is_file()]
    found = {path.name: [words for block in examples(path) for words in commands(block)] for path in files}
    assert {name: len(words) for name, words in found.items() if words} == {"pretrained.yaml": 1, "slurm.sh": 1}
    for command in itertools.chain(*found.values()):
        check_command(command, monkeypatch)


def test_several_processes_take_steps_of_the_size_that_a_recipe_means():
    meant = {
        "configs/cifar10_resnet18.yaml": 128,
        "configs/imagenet_resnet34.yaml": 256,
        "configs/snn_imagenet.yaml": 512,
    }
    found = []
    for command in [words for block in blocks(ROOT / "docs/how-to/multi_gpu.md") for words in commands(block)]:
        (program, *words), script, options = script_of(command)
        if program != "accelerate" or "--config" not in options:
            continue
        launcher = launch_command_parser().parse_args([*words[1:], f"scripts/{script}"])
        processes = launcher.num_processes or load_config_from_file(launcher.config_file).num_processes
        config = cli.parse(DistillConfig if script == "distill.py" else SnnTrainingConfig, options).config
        trained_here = isinstance(config, DistillConfig) and not config.teacher.pretrained
        trainings = [config.train, *([config.teacher_train] if trained_here else [])]
        images = meant[options[options.index("--config") + 1]]
        assert {train.batch_size * train.accumulate * processes for train in trainings} == {images}, command
        found.append(processes)
    assert found == [8, 8, 4, 1, 16]


def test_the_first_two_blocks_of_the_readme_are_its_two_commands():
    first, second = [block for block in blocks(README) if block.language == "bash"][:2]
    assert first.text.splitlines()[-1] == "accelerate launch scripts/distill.py"
    assert second.text.splitlines()[-1] == "python -m pytest"
    assert [block.mark for block in (first, second)] == ["as in the README"] * 2  # .ci/run runs them


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_are_of_known_languages(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "yaml", "bibtex", ""), block.place
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "":
            assert not re.search(r"(?m)^(accelerate|python|pip) ", block.text), (
                f"{block.place}: bash, if it is a command"
            )


def known_options(script: str, monkeypatch, capsys) -> set[str]:
    with pytest.raises(SystemExit) as end, monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--help"])
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert not end.value.code
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))


def test_every_option_that_the_pages_name_is_one(monkeypatch, capsys):
    path = list(sys.path)
    known = set()
    for script in sorted((ROOT / "scripts").glob("*.py")):
        known |= known_options(script.name, monkeypatch, capsys)
    sys.path[:] = path
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    others = {"--nproc_per_node", "--kill-on-bad-exit"}  # of torchrun and srun
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
                assert option in known | launcher | others, f"{page.name}: {option} is an option of no script"
