"""What the command lines share: patterns read from arguments, and errors told in one line."""

import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from hf_sparse.errors import FailedRunError, HfSparseError, LostProcessError, PushError, UnfinishedConversionError
from hf_sparse.patterns import PATTERNS, Pattern, pattern_from_dict

PATTERN_HELP = 'A key of `hf-sparse patterns`, several joined by "|" for their union, or a pattern as JSON.'
SET_HELP = "field=value, the value as JSON; of a union, key.field=value. May be repeated."


def make_app() -> typer.Typer:
    """Return an app whose errors are left to :func:`run`."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(app: typer.Typer, prog_name: str, args: Sequence[str] | None = None) -> NoReturn:
    """Run an app and leave the process.

    Exit codes: 0; 2 where the call or what it names is at fault, 1 where something failed on the way, both with one line
    on stderr that says what to do; 130 after Ctrl-C, which cleans up first; 143 after SIGTERM, after which a conversion can be
    gone on with.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = app(list(sys.argv[1:] if args is None else args), prog_name=prog_name, standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = prog_name if context is None else context.command_path
        _fail(f"{path}: {error.format_message().rstrip('.')}; try {path} --help", error.exit_code)
    except typer.Abort:
        _fail(f"{prog_name}: stopped", 130)
    except (UnfinishedConversionError, FailedRunError, LostProcessError, PushError) as error:
        _fail(f"{prog_name}: {error}", 1)
    except (HfSparseError, ValueError, TypeError, OSError) as error:
        _fail(f"{prog_name}: {error}", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _stop(number: int, _frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(message: str, code: int) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def read_pattern(text: str, settings: Sequence[str] = ()) -> Pattern:
    """Return the pattern that arguments describe.

    Args:
        text: a key, several joined by "|", or JSON as ``to_dict`` gives it.
        settings: ``field=value`` or ``key.field=value``; a value that is not JSON is text.

    Raises:
        ValueError: if a key, a field or a setting is unknown or malformed.
    """
    is_json = text.lstrip().startswith("{")
    members = [_read_object(text)] if is_json else [{"key": key.strip()} for key in text.split("|")]
    keys = [member.get("key") for member in members]
    for key in keys:
        if len(keys) > 1 and key not in PATTERNS:
            raise ValueError(f"unknown pattern {key!r} in {text!r}; known: {', '.join(sorted(PATTERNS))}")
        if keys.count(key) > 1:
            raise ValueError(f"{text!r} names {key!r} twice; write such a union as JSON")
    for setting in settings:
        member, field, value = _read_setting(setting, keys)
        if field in members[member]:
            raise ValueError(f"--set {setting}: {field!r} was set already")
        members[member][field] = value
    return pattern_from_dict(members[0] if len(members) == 1 else {"key": "union", "patterns": members})


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the pattern {text!r} is not valid JSON: {error}") from error
    return dict(value)


def _read_setting(setting: str, keys: list[Any]) -> tuple[int, str, Any]:
    """Return which member a setting is for, its field and its value."""
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise ValueError(f"--set takes field=value, got {setting!r}")
    key, dot, field = name.rpartition(".")
    if dot and key not in keys:
        raise ValueError(f"--set {setting}: {key!r} is no part of the pattern; its parts: {', '.join(map(str, keys))}")
    if not dot and len(keys) > 1:
        raise ValueError(f"--set {setting}: say which part it is for, as in {keys[0]}.{name}={text}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return (keys.index(key) if dot else 0), field, value
