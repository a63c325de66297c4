"""Options: dataclass defaults < config files < flags, with every name, type and range checked.

    @dataclass(frozen=True)
    class TrainConfig:
        batch_size: PositiveInt = 12  # blocks in a micro-batch
        sharding: Literal["none", "fsdp"] = "none"  # where the parameters lie
        beta1: Annotated[float, ">= 0", "< 1"] = 0.9  # AdamW's memory of the gradient
        model: GPTConfig = GPTConfig()  # nested options have flat names: --n_layer=6

        def __post_init__(self):
            check_options(self)

    config, given = load_config(TrainConfig, sys.argv[1:])  # config/a.py --n_layer=6 --compile

A config file is ordinary Python, run in a namespace of its own; the plain values it leaves behind are its options.
"""

import ast
import dataclasses
import difflib
import inspect
import operator
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from engine.base.errors import UserError

PositiveInt = Annotated[int, ">= 1", "<= 1e12"]
NonNegativeInt = Annotated[int, ">= 0", "<= 1e12"]
NonNegativeFloat = Annotated[float, ">= 0", "<= 1e6"]
Fraction = Annotated[float, ">= 0", "<= 1"]
Seed = Annotated[int, ">= 0", "<= 9e18"]

T = TypeVar("T")
COMPARISONS = {
    ">=": (operator.ge, "at least"),
    "<=": (operator.le, "at most"),
    ">": (operator.gt, "above"),
    "<": (operator.lt, "below"),
}
UNIONS = (typing.Union, types.UnionType)
# what a conversion raises
WRONG = (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError)


def check_options(options: Any) -> None:
    """Refuse values outside the ranges and choices that the fields of a dataclass declare."""
    for name, kind in typing.get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if problem := _problem(value, kind):
            raise UserError(f"{name} = {value!r} {problem}")


def _problem(value: Any, kind: Any) -> str:
    """Why a value does not fit Literal[...], Annotated[number, "> 0", ...] or a union; "" if it does."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return "" if value in choices else f"is not one of: {', '.join(choices)}"
    if typing.get_origin(kind) in UNIONS:
        problems = [_problem(value, choice) for choice in typing.get_args(kind)]
        return "" if "" in problems else " and ".join(problems)
    for rule in getattr(kind, "__metadata__", ()):
        symbol, limit = rule.split()
        compare, words = COMPARISONS[symbol]
        if not isinstance(value, Real):
            return "is not a number"
        if not compare(value, float(limit)):
            return f"must be {words} {limit}"
    return ""


def load_config(
    cls: type[T], argv: Sequence[str], fixed: Mapping[str, Any] | None = None
) -> tuple[T, set[str]]:
    """The options of a script and the names that the user gave. argv: config files and flags, later ones win.

    fixed: what the script itself decides (train_bayes.py fixes weights); to override that is an error. --help prints
    every option with its default and comment, and exits.
    """
    fixed = dict(fixed or {})
    options = flat_fields(cls)
    if {"--help", "-h"} & set(argv):
        print_help(cls, fixed)
        sys.exit(0)
    files, flags = _split_arguments(argv, options)
    given: dict[str, Any] = {}
    for path in files:
        for name, value in _run_config_file(path, options).items():
            given[name] = _checked(options, fixed, name, value, where=str(path))
    for name, text in flags:
        given[name] = _checked(options, fixed, name, text, where="")
    return build(cls, given | fixed), set(given)


def config_files(cls: type, argv: Sequence[str]) -> list[Path]:
    """The config files on a command line."""
    return _split_arguments(argv, flat_fields(cls))[0]


def flat_fields(cls: type) -> dict[str, Any]:
    """Option name -> its type, nested dataclasses flattened."""
    types_of, fields = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        inner = types_of[field.name]
        fields |= flat_fields(inner) if dataclasses.is_dataclass(inner) else {field.name: inner}
    return fields


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with these flat values, the nested ones' own fields filled from the same mapping."""
    types_of, own = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        inner = types_of[field.name]
        if dataclasses.is_dataclass(inner):
            own[field.name] = build(inner, values)
        elif field.name in values:
            own[field.name] = _checked(
                {field.name: inner}, {}, field.name, values[field.name], where="options"
            )
    return cls(**own)


def flatten(config: Any) -> dict[str, Any]:
    """The opposite of build: every option's value under its flat name."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def print_help(cls: type, fixed: Mapping[str, Any]) -> None:
    """Every option, its default and the comment beside it in the source."""
    script = Path(sys.argv[0]).name
    print(f"usage: python {script} [config/file.py ...] [--option=value ...]\n")
    if script_doc := inspect.getdoc(sys.modules["__main__"]):
        print(script_doc, "\n")
    defaults = flatten(build(cls, fixed))
    for name, comment in _comments(cls).items():
        note = "  (fixed by this script)" if name in fixed else ""
        print(f"  --{name}={defaults[name]!r}{note}\n        {comment}")


def _comments(cls: type) -> dict[str, str]:
    """Flat option name -> the comment at the end of its line, or else on the lines above it."""
    types_of, found = typing.get_type_hints(cls), {}
    # its own lines come first
    source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
    for field in dataclasses.fields(cls):
        inner = types_of[field.name]
        if dataclasses.is_dataclass(inner):
            found |= _comments(inner)
            continue
        line = re.search(
            rf"((?:^    #.*\n)*)^    {field.name}: (?:.*#\s*(.*))?", source, re.MULTILINE
        )
        above, beside = line.groups("") if line else ("", "")
        found[field.name] = beside or " ".join(re.findall(r"# (.*)", above))
    return found


def _split_arguments(
    argv: Sequence[str], options: Mapping[str, Any]
) -> tuple[list[Path], list[tuple[str, str]]]:
    """--key=value, --key value, --key alone for a truth value; everything else is a config file."""
    files, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            files.append(Path(argument))
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            is_bool = options.get(name) is bool
            has_value = bool(rest) and not rest[0].startswith("--")
            if is_bool and not (
                has_value and rest[0] in ("True", "False", "true", "false", "0", "1")
            ):
                text = "True"
            elif has_value or name not in options:
                text = rest.pop(0) if has_value else ""
            else:
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
        flags.append((name, text))
    return files, flags


def _run_config_file(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values a config file leaves behind: no modules, no functions, no name with an underscore in front.

    What has an option's name stays whatever it is, so that a wrong type is refused and not passed over.
    """
    if not path.is_file():
        if path.exists():
            raise UserError(f"config file {path} is not a file")
        hint = difflib.get_close_matches(str(path), map(str, Path("config").glob("*.py")), 1)
        raise UserError(
            f"config file {path} does not exist" + (f"; did you mean {hint[0]}?" if hint else "")
        )
    try:
        names = runpy.run_path(str(path))
    except (
        Exception,
        SystemExit,
    ) as error:  # the file is the user's own program: any exception is theirs to mend
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
        line = getattr(error, "lineno", 0) or max(lines, default=0)
        raise UserError(
            f"config file {path}, line {line}: {type(error).__name__}: {error}"
        ) from None
    plain = (bool, int, float, str, type(None), list, tuple, dict)
    return {
        n: v
        for n, v in names.items()
        if not n.startswith("_") and (n in options or isinstance(v, plain))
    }


def _checked(
    options: Mapping[str, Any], fixed: Mapping[str, Any], name: str, value: Any, where: str
) -> Any:
    """The value in the option's type; unknown names, wrong types and fixed options are refused with a way out."""
    in_file = f"{where}: " if where else ""
    shown = name if where else f"--{name}"
    if name in fixed:
        if isinstance(value, type(fixed[name])) and value == fixed[name]:
            return fixed[name]
        raise UserError(
            f"{in_file}this script fixes {name} = {fixed[name]!r}; for another value use train.py --{name}={value}"
        )
    if name not in options:
        close = difflib.get_close_matches(name, options, 1)
        hint = f"did you mean '{close[0]}'?" if close else "see --help"
        if where:
            hint += " (a helper of your own in a config file begins with an underscore)"
        raise UserError(f"{in_file}unknown option '{shown}'; {hint}")
    wanted = options[name]
    try:
        return _convert(value, wanted, is_text=not where)
    except WRONG:
        names = getattr(wanted, "__name__", None) or str(wanted)
        got = "" if not where else f", a {type(value).__name__}"
        raise UserError(f"{in_file}{shown} wants {names}, got {value!r}{got}") from None


def _convert(value: Any, wanted: Any, is_text: bool) -> Any:
    if typing.get_origin(wanted) is Literal:  # check_options holds it against the choices
        wanted = str
    if typing.get_origin(wanted) in UNIONS:  # e.g. float | str: the first that fits
        for choice in typing.get_args(wanted):
            try:
                return _convert(value, choice, is_text)
            except WRONG:
                continue
        raise TypeError
    if wanted is str:
        if not isinstance(value, str) or "\0" in value:
            raise TypeError
        # what is not Unicode, as bytes of another encoding in a flag, can be neither printed nor a
        # name
        value.encode()
        return value
    if is_text:
        value = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    if wanted is bool:
        if value not in (True, False):
            raise TypeError
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if wanted is int and value != int(value):
        raise ValueError
    return wanted(value)
