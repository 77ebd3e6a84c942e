"""Methods by name: frozen dataclasses in a registry of import paths, and the user's own."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fedkd.errors import ConfigError

T = TypeVar("T")


def class_named(name: str, known: Mapping[str, str], base: type[T], what: str, home: str) -> type[T]:
    """Return the class of a registered name, or of ``package.module:Class``.

    Args:
        known: import paths by name.
        base: what the class must derive from.
        what, home: what is named, and where ``base`` is imported from, for errors.
    Raises:
        ConfigError: no such name, or the class is no frozen dataclass derived from ``base``.
    """
    path = known.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no {what} is named {name!r}.{hint} Known: {', '.join(known)}; or package.module:Class.")
    module, attribute = path.split(":", 1)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise ConfigError(f"method {name!r} cannot be imported: {cause}") from cause
    if not (dataclasses.is_dataclass(found) and isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"method {name!r} is no frozen dataclass derived from {home}.{base.__name__}")
    return found


def check_parameters(cls: type, name: str, given: Iterable[str]) -> None:
    """Refuse parameters that the dataclass ``cls`` does not have.

    Raises:
        ConfigError: with the nearest one that it has.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" It takes: {', '.join(known) or 'none'}."
            raise ConfigError(f"{name} has no parameter {key!r}.{hint}")
