"""Command lines made of the configuration's dataclasses, with one clear line for each mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from distill.allocator import keep_memory
from distill.data.faults import LoaderProcessDied, loader_errors_explained
from distill.interruption import INTERRUPTION, Preempted, follow_launcher
from distill.processes import first_to_fail
from distill.steps import NonFiniteLossError
from distill.words import recipe_with_nulls, with_lists, with_nulls
from models import NonContractingLoopError, UnsupportedOperationError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")

USER_ERRORS = (
    ValueError,
    OSError,
    UnsupportedOperationError,
    NonFiniteLossError,
    NonContractingLoopError,
    LoaderProcessDied,
)
"""What a user's mistake raises, or a machine too small; without the traceback unless SPIKESWAP_TRACEBACK is set."""


class _Parser(ArgumentParser):
    config_class: type

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """A recipe, in which none means null."""
        return super().parse_string(recipe_with_nulls(content, self.config_class), *args, **kwargs)

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """One line instead of the usage of all options, with the keys that are close to an unknown one."""
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        unknown = [word.lstrip("-").partition("=")[0] for word in re.findall(r"--[\w.]+", message)]
        unknown += re.findall(r"[Oo]ption '([\w.]+)' is not accepted", message)
        group = re.search(r"[Gg]roup '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", message)
        unknown += [f"{group[1]}.{group[2]}"] if group else re.findall(r"[Kk]ey ['\"]([\w.]+)['\"] is not", message)
        for key in unknown:
            if key not in known:
                parent = key.rpartition(".")[0]
                siblings = [k for k in known if k.rpartition(".")[0] == parent and "." in k] or known
                close = difflib.get_close_matches(key, known, n=3) or siblings
                message += f" - {key!r} is unknown; allowed: {', '.join(close)}"
        if first_to_fail():
            print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


class Command(NamedTuple, Generic[C]):
    """What a command line says."""

    config: C
    resume: bool
    text: str
    """The whole configuration as YAML."""
    allow_changed: list[str]
    """Fields that may differ from those of the run that is resumed."""


def parse(
    config_class: type[C],
    argv: Sequence[str] | None,
    default_recipe: Path | None = None,
    resumable: bool = True,
    positional: str | None = None,
    pretrained_recipe: Path | None = None,
) -> Command[C]:
    """Reads a command line.

    Args:
        config_class: a configuration dataclass; its docstrings are the help.
        argv: the arguments; None for those of the process.
        default_recipe: the recipe where no --config is given.
        resumable: whether there is a --resume.
        positional: a field, a list of texts, that is given by its place and not by its name.
        pretrained_recipe: the default's place is its where teacher.pretrained is said: the weights bring a size along.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=Path(sys.argv[0]).name, description=config_class.__doc__, allow_abbrev=False)
    parser.config_class = config_class
    parser.add_argument(
        "--config", action="config", help="Recipe to start from, a YAML file (more than one may be given)."
    )
    if resumable:
        parser.add_argument("--resume", action="store_true", help="Continue an interrupted run.")
        parser.add_argument(
            "--allow-changed",
            nargs="+",
            default=[],
            metavar="KEY",
            help="Fields (or groups, or 'processes') that may differ from those of the run that is resumed.",
        )
    if positional is not None:
        parser.add_argument(positional, nargs="+", type=str, metavar=positional.upper(), help="One or more.")
    parser.add_class_arguments(config_class, as_group=False, skip=set() if positional is None else {positional})
    if any(a.split("=")[0] in ("--config", "-h", "--help") for a in argv):
        default_recipe = None

    def read(recipe: Path | None) -> Any:
        words = argv if recipe is None else ["--config", str(recipe), *argv]
        return parser.parse_args(with_nulls(with_lists(words, config_class), config_class))

    namespace = read(default_recipe)
    if default_recipe is not None and pretrained_recipe is not None and namespace.teacher.pretrained:
        default_recipe = pretrained_recipe
        namespace = read(default_recipe)
    try:
        config = _build(config_class, namespace)
    except ValueError as error:
        whose = f" (without --config what is not said is from {default_recipe.name})" if default_recipe else ""
        parser.error(f"{error}{whose}")
    plain = yaml.safe_load(parser.dump(namespace, skip_unset=False))
    for name in ("resume", "config", "allow_changed"):
        plain.pop(name, None)
    if default_recipe is not None:
        _name_recipe(parser.prog, default_recipe, plain)
    text = yaml.safe_dump(plain, sort_keys=False)
    return Command(config, resumable and namespace.resume, text, namespace.allow_changed if resumable else [])


def _name_recipe(prog: str, recipe: Path, said: dict[str, Any]) -> None:
    """Warns of a recipe that nobody has named and that has the size of its own data, where it is used for others."""
    recipe_says = yaml.safe_load(recipe.read_text())
    of_recipe = recipe_says.get("data", {}).get("name")
    if recipe_says.get("teacher", {}).get("pretrained"):  # the weights bring the size
        return
    if of_recipe not in (None, said["data"]["name"]) and os.environ.get("RANK", "0") == "0":
        print(
            f"{prog}: warning: no --config: what is not said is taken from {recipe.name}, made for data.name "
            f"{of_recipe}, the size of the images and the training, too",
            file=sys.stderr,
        )


def _build(config_class: type[C], namespace: Any, prefix: str = "") -> C:
    """The dataclass of a parsed namespace; an error names the field with the groups that it is in."""
    hints, values = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        value = getattr(namespace, field.name)
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        values[field.name] = value
    try:
        return config_class(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def run(main: Callable[[], None], resumable: bool = True) -> None:
    """Calls `main`; a user's mistake ends the process with one line on stderr and status 2.

    Args:
        resumable: whether SIGTERM asks it to save and end, to be continued with --resume.

    Of several processes the first to fail says why, and the main process that they were all asked to stop.
    """
    keep_memory()
    # before threads are made, which take it over: gradients that vanish in silent layers become numbers below the least
    # normal one, and a CPU takes many times as long for each
    torch.set_flush_denormal(True)
    try:
        with INTERRUPTION.listening() if resumable else contextlib.nullcontext(), loader_errors_explained():
            follow_launcher()
            main()
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {stop.message}; continue with --resume", file=sys.stderr)
            stop.tell()
        raise
    except Exception as error:
        first, mistake = first_to_fail(), isinstance(error, USER_ERRORS)
        if os.environ.get("SPIKESWAP_TRACEBACK") or (first and not mistake):
            raise
        if first:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if mistake else 1)
