"""The words of an experiment that travel, and the proxy set as bytes: what a device needs to read without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedkd.data import ProxySet
from fedkd.data.proxy import decode_inputs, encode_inputs
from fedkd.data.scaling import Standardiser
from fedkd.errors import DataError
from fedkd.privacy.policy import PolicyError

SECTIONS = (
    "name", "seed", "rounds", "dtype", "proxy_per_round", "models", "algorithm", "training", "digest", "pretrain",
    "codec", "privacy",
)  # fmt: skip
"""Sections that travel whole."""
OTHERS = ("population", "augment", "clients", "classes", "shape", "proxy", "answer")
SCALING = ("center", "scale", "fill")
MAX_SCALING_VALUES = 100_000


def check_words(told: Mapping[str, Any]) -> None:
    """Refuse words that are no server's to say.

    Raises:
        PolicyError: naming them.
    """
    strange = sorted(set(told) - {*SECTIONS, *OTHERS})
    if strange:
        raise PolicyError(f"the server speaks of {', '.join(map(repr, strange))}, which is no server's to say")
    privacy = told.get("privacy")
    if isinstance(privacy, dict) and privacy.get("policy") is not None:
        raise PolicyError("privacy.policy is this node's own, not the server's to name")


def pack_proxy(proxy: ProxySet) -> bytes:
    """Return the proxy set and its scaling as they travel once to a device that lacks them."""
    scaling = proxy.scaling
    head = json.dumps(
        {
            "name": proxy.name,
            "scaling": None if scaling is None else {n: _plain(getattr(scaling, n)) for n in SCALING},
        }
    ).encode()
    return struct.pack("<I", len(head)) + head + encode_inputs(proxy.x, proxy.y)


def unpack_proxy(data: bytes, cap_bytes: int) -> ProxySet:
    """Undo :func:`pack_proxy`.

    Raises:
        DataError: the bytes hold something else, or more than ``cap_bytes``.
    """
    try:
        (size,) = struct.unpack_from("<I", data)
        head = json.loads(data[4 : 4 + size])
        told = head["scaling"]
        scaling = None if told is None else Standardiser(**{n: _array(told[n]) for n in SCALING})
        name = str(head["name"])[:64]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise DataError(f"the bytes are no proxy set of fedkd ({cause}): fetch it from the server again") from cause
    x, y = decode_inputs(data[4 + size :], cap_bytes)
    return ProxySet(x, y, name, scaling)


def _plain(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "values": [float(v) for v in array.reshape(-1)]}


def _array(told: Mapping[str, Any]) -> np.ndarray:
    values = told["values"]
    if len(values) > MAX_SCALING_VALUES:
        raise ValueError("too many constants")
    array = np.asarray(values, np.float32)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError("constants that are no finite numbers")
    return array.reshape([int(n) for n in told["shape"]])
