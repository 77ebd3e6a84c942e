"""The methods by name, and the user's own by import path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from fedkd.errors import ConfigError
from fedkd.named import class_named, made

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm

METHODS: Mapping[str, str] = {
    "local": "fedkd.algorithms.baselines:Local",
    "central": "fedkd.algorithms.baselines:Central",
    "fedavg": "fedkd.algorithms.fedavg:FedAvg",
    "fedprox": "fedkd.algorithms.fedprox:FedProx",
    "fd": "fedkd.algorithms.fd:FD",
    "fedmd": "fedkd.algorithms.fedmd:FedMD",
    "ds_fl": "fedkd.algorithms.ds_fl:DSFL",
    "cfd": "fedkd.algorithms.cfd:CFD",
    "feddf": "fedkd.algorithms.feddf:FedDF",
    "fedproto": "fedkd.algorithms.fedproto:FedProto",
    "scarlet": "fedkd.algorithms.scarlet:SCARLET",
    "selective_fd": "fedkd.algorithms.selective_fd:SelectiveFD",
    "comet": "fedkd.algorithms.comet:COMET",
    "fml": "fedkd.algorithms.fml:FML",
    "fedkd": "fedkd.algorithms.fedkd:FedKD",
    "fedaux": "fedkd.algorithms.fedaux:FedAUX",
    "feded": "fedkd.algorithms.feded:FedED",
    "fedgems": "fedkd.algorithms.fedgems:FedGEMS",
    "fedet": "fedkd.algorithms.fedet:FedET",
    "fedkt": "fedkd.algorithms.fedkt:FedKT",
    "fedgkt": "fedkd.algorithms.fedgkt:FedGKT",
    "fedhkd": "fedkd.algorithms.fedhkd:FedHKD",
    "fedcache": "fedkd.algorithms.fedcache:FedCache",
    "dense": "fedkd.algorithms.dense:DENSE",
    "fedgen": "fedkd.algorithms.fedgen:FedGen",
    "fedftg": "fedkd.algorithms.fedftg:FedFTG",
    "co_boosting": "fedkd.algorithms.co_boosting:CoBoosting",
}


DEFAULT = "ds_fl"


def method_class(name: str) -> type[Algorithm]:
    """Return the class of a registered method or of ``package.module:Class``.

    Raises:
        ConfigError: no such method, or it is not an :class:`Algorithm`.
    """
    # Here, so that a client without torch can read the names.
    from fedkd.algorithms.base import Algorithm

    return class_named(name, METHODS, Algorithm, "method", "fedkd.algorithms.base")


def resolve(value: Any) -> dict[str, Any]:
    """Turn a name or a section into the full section: name and every parameter, validated.

    Raises:
        ConfigError: unknown method or parameter (with the nearest known one), or a value of the wrong type.
    """
    section = {"name": value} if isinstance(value, str) else value
    if isinstance(section, dict):
        section = {"name": DEFAULT, **section}
    if not isinstance(section, dict) or not isinstance(section["name"], str):
        raise ConfigError("expected a method's name, or a section with `name:` and its parameters")
    return {"name": section["name"], **dataclasses.asdict(build(section))}


def build(section: Mapping[str, Any]) -> Algorithm:
    """Build the method from its section ``{"name": ..., parameters}``."""
    name = section["name"]
    return made(method_class(name), name, {k: v for k, v in section.items() if k != "name"})


def schemas() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the JSON schema of every registered method's section, and shared definitions."""
    found: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for name in METHODS:
        cls = method_class(name)
        one = TypeAdapter(cls).json_schema()
        definitions.update(one.pop("$defs", {}))
        one["properties"] = {"name": {"const": name}, **one.get("properties", {})}
        one["required"] = ["name"]
        one["additionalProperties"] = False
        one["title"] = cls.__name__
        one.pop("description", None)
        found.append(one)
    return found, definitions
