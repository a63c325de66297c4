"""Options: dataclass defaults < config files < flags, with every name, type and range checked.

    @dataclass(frozen=True)
    class TrainConfig:
        batch_size: PositiveInt = 12  # blocks in a micro-batch
        sharding: Literal["none", "fsdp"] = "none"  # whether processes share the parameters
        beta1: Annotated[float, ">= 0", "< 1"] = 0.9  # AdamW's decay of the gradient's average
        model: GPTConfig = GPTConfig()  # nested options have flat names: --n_layer=6

    config, given = load_config(TrainConfig, sys.argv[1:])  # config/a.py --n_layer=6 --compile

A config file is ordinary Python. It runs in its own namespace, and the plain values in that are
its options.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.base.errors import UserError

PositiveInt = Annotated[int, ">= 1", "<= 1e12"]
NonNegativeInt = Annotated[int, ">= 0", "<= 1e12"]
NonNegativeFloat = Annotated[float, ">= 0", "<= 1e6"]
Fraction = Annotated[float, ">= 0", "<= 1"]
Seed = Annotated[int, ">= 0", "<= 9e18"]
Draws = Annotated[int, ">= -1", "<= 1e6"]  # of Bayesian weights; -1: all, not sampled

COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
TRUTH_VALUES = ("True", "False", "true", "false", "0", "1")
WRONG = (ValueError, TypeError, SyntaxError, OverflowError)  # a conversion raises one of these


def check_options(options: Any) -> None:
    """Refuse values outside the ranges and choices that a dataclass declares for its fields."""
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        if problem := _problem(value, kind):
            raise UserError(f"{name} = {value!r} {problem}")


def _problem(value, kind):
    """How a value violates its field's range or choices; "" if it does not."""
    if get_origin(kind) is Union:  # of a number and words: float | Literal["auto"]
        number, words = get_args(kind)
        kind = words if isinstance(value, str) else number
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"is not one of: {', '.join(choices)}"
    for rule in getattr(kind, "__metadata__", ()):
        symbol, limit = rule.split()
        if not COMPARISONS[symbol](value, float(limit)):
            return f"must be {rule}"
    return ""


def load_config(
    cls: type, argv: Sequence[str], fixed: Mapping[str, str] | None = None
) -> tuple[Any, set[str]]:
    """The options of a script, and the names of those that the user gave.

    argv: config files and flags; later ones win. fixed: options that the script sets itself and
    that the user may not change. --help prints every option and exits.
    """
    fixed = fixed or {}
    options = flat_fields(cls)
    if {"--help", "-h"} & set(argv):
        print_help(cls, fixed)
        sys.exit(0)
    files, flags = _split_arguments(argv, options)
    given: dict[str, Any] = {}
    for path in files:
        for name, value in _run_config_file(path).items():
            given[name] = _checked(options, name, value, f"{path}: ")
    for name, text in flags:
        given[name] = _checked(options, name, text, "--")
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(
                f"this script sets {name} = {value!r}; use train.py --{name}={given[name]}"
            )
    return build(cls, {**given, **fixed}), set(given)


def flat_fields(cls: type) -> dict[str, Any]:
    """Option name -> its type, with nested dataclasses flattened."""
    fields = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            fields |= flat_fields(kind)
        else:
            fields[name] = kind
    return fields


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass with these flat values, some of which belong to nested dataclasses."""
    arguments = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = build(kind, values)
        elif name in values:
            arguments[name] = _checked({name: kind}, name, values[name], "options: ")
    options = cls(**arguments)
    check_options(options)
    return options


def flatten(config: Any) -> dict[str, Any]:
    """The inverse of build: flat option name -> value."""
    values = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            values |= flatten(value)
        else:
            values[name] = value
    return values


def print_help(cls: type, fixed: Mapping[str, Any]) -> None:
    """Print every option with its default and its comment in the source."""
    script = Path(sys.argv[0]).name
    print(f"usage: python {script} [config/file.py ...] [--option=value ...]\n")
    if script_doc := inspect.getdoc(sys.modules["__main__"]):
        print(script_doc, "\n")
    comments = _comments(cls)
    for name, default in flatten(build(cls, fixed)).items():
        print(f"  --{name}={default!r}\n        {comments[name]}")


def _comments(cls):
    """Flat option name -> the comment at the end of its line, or on the lines above it."""
    found = {}
    for kind in get_type_hints(cls).values():
        if dataclasses.is_dataclass(kind):
            found |= _comments(kind)
    # base classes first: the comment of the class itself wins
    source = "".join(inspect.getsource(base) for base in cls.__mro__[-2::-1])
    field = re.compile(r"((?:^    #.*\n)*)^    (\w+): (?:.*#\s*(.*))?", re.MULTILINE)
    for above, name, beside in field.findall(source):
        found[name] = beside or " ".join(re.findall(r"# (.*)", above))
    return found


def _split_arguments(argv, options):
    """Flags are --key=value, --key value, or --key for True; all else are config files."""
    files, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            files.append(Path(argument))
            continue
        name, equals, text = argument[2:].partition("=")
        if not equals:
            following = rest[0] if rest else "--"
            if options.get(name) is bool and following not in TRUTH_VALUES:
                text = "True"
            elif not following.startswith("--"):
                text = rest.pop(0)
            elif name in options:
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
        flags.append((name, text))
    return files, flags


def _run_config_file(path):
    """The plain values that a config file sets, without modules, functions and names that begin
    with an underscore.
    """
    if not path.is_file():
        hint = _did_you_mean(str(path), map(str, Path("config").glob("*.py")))
        raise UserError(f"config file {path} does not exist{hint}")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # a user's program may raise anything
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from None
    values = {}
    for name, value in names.items():
        is_helper = name.startswith("_") or callable(value) or inspect.ismodule(value)
        if not is_helper:
            values[name] = value
    return values


def _checked(options, name, value, where):
    """The value in the option's type. Refuses unknown names and wrong types.

    where: the text before the name in a message; "--" for a flag, whose value is text."""
    if name not in options:
        advice = "see --help" if where == "--" else "start the name of a helper with an underscore"
        hint = _did_you_mean(name, options) or f"; {advice}"
        raise UserError(f"{where}{name} is not an option{hint}")
    try:
        return _convert(value, options[name], is_text=where == "--")
    except WRONG:
        kind = options[name]
        wanted = kind.__name__ if isinstance(kind, type) else kind
        raise UserError(f"{where}{name} wants {wanted}, got {value!r}") from None


def _did_you_mean(name, known):
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(value, wanted, is_text):
    """The value in the wanted type, or one of WRONG. is_text: it comes from the command line."""
    if get_origin(wanted) is Union:
        number, word = get_args(wanted)
        with contextlib.suppress(*WRONG):
            return _convert(value, number, is_text)
        return _convert(value, word, is_text)
    if wanted is str or get_origin(wanted) is Literal:
        if not isinstance(value, str):
            raise TypeError
        return value
    if is_text:
        value = ast.literal_eval(value.capitalize() if value in TRUTH_VALUES else value)
    # in Python True == 1, but True is no value of an int option
    fits = value in (True, False) if wanted is bool else not isinstance(value, bool)
    if not fits or wanted(value) != value:
        raise TypeError
    return wanted(value)
