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

A config file is ordinary Python, run in a namespace of its own; the plain values it leaves behind
are its options.
"""

import ast
import contextlib
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
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal

from engine.base.errors import UserError

PositiveInt = Annotated[int, ">= 1", "<= 1e12"]
NonNegativeInt = Annotated[int, ">= 0", "<= 1e12"]
NonNegativeFloat = Annotated[float, ">= 0", "<= 1e6"]
Fraction = Annotated[float, ">= 0", "<= 1"]
Seed = Annotated[int, ">= 0", "<= 9e18"]

COMPARISONS = {
    ">=": (operator.ge, "at least"),
    "<=": (operator.le, "at most"),
    ">": (operator.gt, "above"),
    "<": (operator.lt, "below"),
}
TRUTH_VALUES = ("True", "False", "true", "false", "0", "1")
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
    """Why a value does not fit Literal[...], Annotated[number, "> 0"] or a union; "" if it does."""
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
    cls: type, argv: Sequence[str], fixed: Mapping[str, str] | None = None
) -> tuple[Any, set[str]]:
    """The options of a script, and the names of those that the user gave.

    argv: config files and flags, of which later ones win. fixed: options that the script itself
    sets, which the user may not change. --help prints every option and exits.
    """
    fixed = fixed or {}
    options = flat_fields(cls)
    if {"--help", "-h"} & set(argv):
        print_help(cls, fixed)
        sys.exit(0)
    files, flags = _split_arguments(argv, options)
    given: dict[str, Any] = {}
    for path in files:
        for name, value in _run_config_file(path, options).items():
            given[name] = _checked(options, name, value, f"{path}: ")
    for name, text in flags:
        given[name] = _checked(options, name, text, "--")
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(
                f"this script sets {name} = {value!r}; "
                f"for another value use train.py --{name}={given[name]}"
            )
    return build(cls, {**given, **fixed}), set(given)


def flat_fields(cls: type) -> dict[str, Any]:
    """Option name -> its type, nested dataclasses flattened."""
    fields = {}
    for name, kind in typing.get_type_hints(cls).items():
        fields |= flat_fields(kind) if dataclasses.is_dataclass(kind) else {name: kind}
    return fields


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass with these flat values, which fill nested dataclasses, too."""
    arguments = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = build(kind, values)
        elif name in values:
            arguments[name] = _checked({name: kind}, name, values[name], "options: ")
    return cls(**arguments)


def flatten(config: Any) -> dict[str, Any]:
    """The opposite of build: every option's value under its flat name."""
    values = {}
    for name, value in vars(config).items():
        values |= flatten(value) if dataclasses.is_dataclass(value) else {name: value}
    return values


def print_help(cls: type, fixed: Mapping[str, Any]) -> None:
    """Every option, its default and the comment beside it in the source."""
    script = Path(sys.argv[0]).name
    print(f"usage: python {script} [config/file.py ...] [--option=value ...]\n")
    if script_doc := inspect.getdoc(sys.modules["__main__"]):
        print(script_doc, "\n")
    defaults = flatten(build(cls, fixed))
    for name, comment in _comments(cls).items():
        note = "  (set by this script)" if name in fixed else ""
        print(f"  --{name}={defaults[name]!r}{note}\n        {comment}")


def _comments(cls: type) -> dict[str, str]:
    """Flat option name -> the comment at the end of its line, or else on the lines above it."""
    found = {}
    # its own lines come first
    source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _comments(kind)
            continue
        field = re.search(rf"((?:^    #.*\n)*)^    {name}: (?:.*#\s*(.*))?", source, re.MULTILINE)
        above, beside = field.groups("") if field else ("", "")
        found[name] = beside or " ".join(re.findall(r"# (.*)", above))
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
            if name not in options:
                raise _unknown(name, options, "--")
            following = rest[0] if rest else "--"
            if options[name] is bool and following not in TRUTH_VALUES:
                text = "True"
            elif following.startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            else:
                text = rest.pop(0)
        flags.append((name, text))
    return files, flags


def _run_config_file(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values a config file leaves behind: no modules, no functions, no name that begins
    with an underscore.

    An option's name counts with any value, so that a wrong type is refused and not ignored.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"config file {path} is not a file")
    if not path.is_file():
        hint = _did_you_mean(str(path), map(str, Path("config").glob("*.py")))
        raise UserError(f"config file {path} does not exist{hint}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # it is the user's program and may raise anything
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
        line = getattr(error, "lineno", 0) or max(lines, default=0)
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"config file {path}, line {line}: {reason}") from None
    plain = (bool, int, float, str, type(None), list, tuple, dict)
    return {
        name: value
        for name, value in names.items()
        if not name.startswith("_") and (name in options or isinstance(value, plain))
    }


def _checked(options: Mapping[str, Any], name: str, value: Any, where: str) -> Any:
    """The value in the option's type; refuse unknown names and wrong types.

    where: what stands before the name in a message, "--" for a flag, whose value is text."""
    if name not in options:
        raise _unknown(name, options, where)
    try:
        return _convert(value, options[name], is_text=where == "--")
    except WRONG:
        wanted = getattr(options[name], "__name__", options[name])
        raise UserError(f"{where}{name} wants {wanted}, got {value!r}") from None


def _unknown(name: str, options: Mapping[str, Any], where: str) -> UserError:
    hint = _did_you_mean(name, options) or "; see --help"
    if where == "--":
        return UserError(f"unknown option '--{name}'{hint}")
    hint += " (a helper of your own in a config file begins with an underscore)"
    return UserError(f"{where}unknown option {name!r}{hint}")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(value: Any, wanted: Any, is_text: bool) -> Any:
    """The value in the wanted type, or one of WRONG. is_text: it comes from the command line."""
    if typing.get_origin(wanted) in UNIONS:  # e.g. float | str: the first that fits
        for choice in typing.get_args(wanted):
            with contextlib.suppress(*WRONG):
                return _convert(value, choice, is_text)
        raise TypeError
    if wanted is str or typing.get_origin(wanted) is Literal:
        if not isinstance(value, str) or "\0" in value:
            raise TypeError
        value.encode()  # raises ValueError for bytes of another encoding in a flag
        return value
    if is_text:
        value = ast.literal_eval(value.capitalize() if value in TRUTH_VALUES else value)
    if wanted is bool and value in (True, False):
        return bool(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is bool or not is_number or (wanted is int and value != int(value)):
        raise TypeError
    return wanted(value)
