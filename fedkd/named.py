"""Things by name: what ``package.module:name`` stands for, and frozen dataclasses from a registry or from the user."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedkd.errors import ConfigError

T = TypeVar("T")


def imported(path: str, what: str) -> Any:
    """Return what ``package.module:name`` stands for.

    Args:
        what: what is imported, for errors.
    Raises:
        ConfigError: it has another form, or cannot be imported.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute.isidentifier():
        raise ConfigError(f"{what} {path!r} cannot be imported: expected package.module:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as cause:  # a user's module may raise anything
        reason = " ".join(str(cause).split())
        # A package of the user's that is not installed is found from its own folder alone.
        hint = "; install its package, or put the folder that holds it on PYTHONPATH"
        raise ConfigError(
            f"{what} {path!r} cannot be imported: {reason or type(cause).__name__}"
            f"{hint if isinstance(cause, ModuleNotFoundError) else ''}"
        ) from cause


def class_named(name: str, known: Mapping[str, str | type], base: type[T], what: str, home: str) -> type[T]:
    """Return the class of a registered name, or of ``package.module:Class``.

    Args:
        known: classes, or their import paths, by name.
        base: what the class must derive from.
        what, home: what is named, and where ``base`` is imported from, for errors.
    Raises:
        ConfigError: no such name, or the class is no frozen dataclass derived from ``base``.
    """
    found: Any = known.get(name, name)
    if isinstance(found, str) and ":" not in found:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no {what} is named {name!r}.{hint} Known: {', '.join(known)}; or package.module:Class.")
    if isinstance(found, str):
        found = imported(found, what)
    if not (dataclasses.is_dataclass(found) and isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{what} {name!r} is no frozen dataclass derived from {home}.{base.__name__}")
    return found


def made(cls: type[T], name: str, given: Mapping[str, Any]) -> T:
    """Return the dataclass ``cls`` with the parameters ``given``, each checked and converted.

    A parameter that is a dataclass itself may be given as a section.

    Raises:
        ConfigError: it has no such parameter (the nearest one is named), or a value does not fit.
    """
    known = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    parameters: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" It takes: {', '.join(known) or 'none'}."
            raise ConfigError(f"{name} has no parameter {key!r}.{hint}")
        within = isinstance(value, Mapping) and dataclasses.is_dataclass(known[key])
        parameters[key] = made(type(known[key]), f"{name}.{key}", value) if within else value
    try:
        return TypeAdapter(cls).validate_python(parameters)
    except ValidationError as cause:
        raise ConfigError(f"{name}: {'; '.join(map(_fault, cause.errors()))}") from cause


def _fault(error: Any) -> str:
    said = error["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {said}, got {error['input']!r}" if where else said
