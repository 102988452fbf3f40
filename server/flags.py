"""One command-line flag per setting, so that the settings object stays the only list of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, Optional

import typer
from pydantic import ValidationError

from aquifer.server.settings import Settings, load_settings

# Keys given as arguments could be read by everyone on the machine.
_NOT_FLAGS = ("api_keys",)


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag per setting; it gets the settings, read from all sources, first."""
    flags = {name: _flag(name) for name in Settings.model_fields if name not in _NOT_FLAGS}
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def wrapper(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in flags}
        command(_settings_or_exit(chosen), **values)

    parameters = [*own, *flags.values()]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__dict__["__signature__"] = inspect.Signature(
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return wrapper


def fail(message: str) -> NoReturn:
    """Say why on stderr and end the command with status 2."""
    print(message, file=sys.stderr)
    raise typer.Exit(2)


def _flag(name: str) -> inspect.Parameter:
    """The option of a setting. Values stay text: the settings object parses and checks them."""
    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    is_switch = field.annotation is bool
    declaration = f"{flag}/--no-{name.replace('_', '-')}" if is_switch else flag
    option = typer.Option(
        declaration, help=f"{field.description or ''} (default: {field.default})", show_default=False
    )
    kind: Any = Optional[bool] if is_switch else Optional[str]  # noqa: UP045
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _settings_or_exit(flags: dict[str, Any]) -> Settings:
    try:
        return load_settings(**flags)
    except ValidationError as error:
        fail(
            "\n".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']} (got {item['input']!r})"
                for item in error.errors()
            )
        )
    except (ValueError, OSError) as error:
        fail(str(error))
