"""Methods without data by name, and the user's own by import path."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedkd.distill.datafree.base import Synthesizer
from fedkd.errors import ConfigError

METHODS: Mapping[str, str] = {
    "dafl": "fedkd.distill.datafree.dafl:DAFL",
    "dfad": "fedkd.distill.datafree.dfad:DFAD",
    "zskt": "fedkd.distill.datafree.zskt:ZSKT",
    "deepinversion": "fedkd.distill.datafree.deepinversion:DeepInversion",
    "cmi": "fedkd.distill.datafree.cmi:CMI",
    "fast": "fedkd.distill.datafree.fast:FastDatafree",
    "noise": "fedkd.distill.datafree.noise:Noise",
}


def method_class(name: str) -> type[Synthesizer]:
    """Return the class of a method, or of ``package.module:Class``.

    Raises:
        ConfigError: no such method, or it is no :class:`Synthesizer`.
    """
    path = METHODS.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no method without data is named {name!r}.{hint} Known: {', '.join(METHODS)}")
    module, attribute = path.split(":", 1)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise ConfigError(f"method {name!r} cannot be imported: {cause}") from cause
    if not (isinstance(found, type) and issubclass(found, Synthesizer) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"method {name!r} is no frozen dataclass derived from fedkd.distill.datafree.Synthesizer")
    return found


def build(section: Mapping[str, Any] | str) -> Synthesizer:
    """Build the method of a name, or of a section ``{"name": ..., parameters}``.

    Raises:
        ConfigError: unknown method or parameter (with the nearest known one), or a value of the wrong type.
    """
    given = {"name": section} if isinstance(section, str) else dict(section)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("expected the name of a method without data, or a section with `name:` and its parameters")
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else f" It takes: {', '.join(known)}."
            raise ConfigError(f"{name} has no parameter {key!r}.{hint}")
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as cause:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in cause.errors())
        raise ConfigError(f"{name}: {'; '.join(faults)}") from cause


def resolve(section: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return the full section: name and every parameter, validated."""
    method = build(section)
    name = section if isinstance(section, str) else section["name"]
    return {"name": name, **dataclasses.asdict(method)}
