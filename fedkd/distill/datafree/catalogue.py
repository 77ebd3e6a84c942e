"""Methods without data by name, and the user's own by import path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedkd.distill.datafree.base import Synthesizer
from fedkd.errors import ConfigError
from fedkd.named import class_named, made

METHODS: Mapping[str, str] = {
    "dafl": "fedkd.distill.datafree.dafl:DAFL",
    "dfad": "fedkd.distill.datafree.dfad:DFAD",
    "zskt": "fedkd.distill.datafree.zskt:ZSKT",
    "deepinversion": "fedkd.distill.datafree.deepinversion:DeepInversion",
    "cmi": "fedkd.distill.datafree.cmi:CMI",
    "fast": "fedkd.distill.datafree.fast:FastDatafree",
    "dfme": "fedkd.distill.datafree.dfme:DFME",
    "ideal": "fedkd.distill.datafree.ideal:IDEAL",
    "noise": "fedkd.distill.datafree.noise:Noise",
    "dense": "fedkd.algorithms.dense:Boundary",
    "co_boosting": "fedkd.algorithms.co_boosting:Boosting",
}


def method_class(name: str) -> type[Synthesizer]:
    """Return the class of a method, or of ``package.module:Class``.

    Raises:
        ConfigError: no such method, or it is no :class:`Synthesizer`.
    """
    return class_named(name, METHODS, Synthesizer, "method without data", "fedkd.distill.datafree")  # type: ignore[type-abstract]


def build(section: Mapping[str, Any] | str) -> Synthesizer:
    """Build the method of a name, or of a section ``{"name": ..., parameters}``.

    Raises:
        ConfigError: unknown method or parameter (with the nearest known one), or a value of the wrong type.
    """
    given = {"name": section} if isinstance(section, str) else dict(section)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("expected the name of a method without data, or a section with `name:` and its parameters")
    return made(method_class(name), name, given)


def resolve(section: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return the full section: name and every parameter, validated."""
    method = build(section)
    name = section if isinstance(section, str) else section["name"]
    return {"name": name, **dataclasses.asdict(method)}
