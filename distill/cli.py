"""Command lines made of the configuration's dataclasses, with one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from models import UnsupportedOperationError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")

USER_ERRORS = (ValueError, FileNotFoundError, UnsupportedOperationError)
"""What a user's mistake raises; shown without the traceback unless SPIKESWAP_TRACEBACK is set."""


class _Parser(ArgumentParser):
    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """One line instead of the usage of all options, with the keys that are close to an unknown one."""
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        unknown = [word.lstrip("-").partition("=")[0] for word in re.findall(r"--[\w.]+", message)]
        group = re.search(r"[Gg]roup '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", message)
        unknown += [f"{group[1]}.{group[2]}"] if group else re.findall(r"[Kk]ey ['\"]([\w.]+)['\"] is not", message)
        for key in unknown:
            if key not in known:
                parent = key.rpartition(".")[0]
                siblings = [k for k in known if k.rpartition(".")[0] == parent and "." in k] or known
                close = difflib.get_close_matches(key, known, n=3) or siblings
                message += f"\n  {key!r} is unknown; allowed: {', '.join(close)}"
        print(f"{self.prog}: error: {message.strip()}", file=sys.stderr)
        sys.exit(2)


def parse(config_class: type[C], argv: Sequence[str] | None, default_recipe: Path | None = None) -> tuple[C, bool, str]:
    """Reads a command line.

    Args:
        config_class: a configuration dataclass; its docstrings are the help.
        argv: the arguments; None for those of the process.
        default_recipe: the recipe where no --config is given.

    Returns:
        the configuration, whether to resume, and the whole configuration as YAML.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=Path(sys.argv[0]).name, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="Recipe to start from, a YAML file (more than one may be given)."
    )
    parser.add_argument("--resume", action="store_true", help="Continue an interrupted run.")
    parser.add_class_arguments(config_class, as_group=False)
    if default_recipe is not None and not any(a.split("=")[0] in ("--config", "-h", "--help") for a in argv):
        argv = ["--config", str(default_recipe), *argv]
    namespace = parser.parse_args(argv)
    try:
        made = parser.instantiate(namespace)
    except ValueError as error:
        parser.error(str(error))
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    plain = yaml.safe_load(parser.dump(namespace, skip_none=False))
    plain.pop("resume")
    plain.pop("config", None)
    return config_class(**values), namespace.resume, yaml.safe_dump(plain, sort_keys=False)


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a user's mistake ends the process with one line on stderr and status 2."""
    try:
        main()
    except USER_ERRORS as error:
        if os.environ.get("SPIKESWAP_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
