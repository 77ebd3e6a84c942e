"""An experiment on a real network: what of it travels, and what server and device make of it.

The server sends the parts that a device needs to work: method, models, training, codec, privacy. Where records lie, how
a simulation would deal them, and how long the server waits are none of a device's business and do not travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedkd.data import Dataset, Federation, ProxySet, Split
from fedkd.data.proxy import build_proxy
from fedkd.data.scaling import Standardiser
from fedkd.data.sources import load
from fedkd.deploy.outline import SECTIONS, check_words
from fedkd.deploy.policy import NodePolicy
from fedkd.errors import ConfigError
from fedkd.experiment import Experiment, validate
from fedkd.models import resolve
from fedkd.privacy.policy import PolicyError
from fedkd.site import Site


# ---- what travels ---------------------------------------------------------------------------------------------------
def outline(site: Site, proxy: bytes | None) -> dict[str, Any]:
    """Return the experiment as a device hears it: plain data, without a path. ``proxy``: see :func:`pack_proxy`."""
    whole = site.experiment.model_dump(mode="json")
    told: dict[str, Any] = {name: whole[name] for name in SECTIONS}
    told["privacy"] = {**told["privacy"], "policy": None}
    told["codec"] = {"up": site.codec_up.spec, "down": site.codec_down.spec}
    told["answer"] = site.method.upload.__name__
    told["population"] = {
        "participation": whole["population"]["participation"],
        "minimum": whole["population"]["minimum"],
    }
    told["augment"] = whole["data"]["augment"]
    told["clients"] = len(site.cards)
    told["classes"], told["shape"] = site.classes, list(site.shape)
    if site.proxy is not None and proxy is not None:
        told["proxy"] = {
            "size": len(site.proxy),
            "labelled": site.proxy.y is not None,
            "sha256": hashlib.sha256(proxy).hexdigest(),
        }
    return told


def read_outline(told: Mapping[str, Any], policy: NodePolicy) -> Experiment:
    """Return the experiment that a server's words describe.

    Raises:
        PolicyError: it asks for a method or a model that this node does not take.
        ConfigError: it does not fit together.
    """
    check_words(told)
    models = told.get("models")
    if not isinstance(models, dict) or not isinstance(models.get("devices"), list):
        raise ConfigError("the server names no models")
    # Before anything else reads them: a name with a colon would be imported.
    policy.check_method(told.get("algorithm"))
    policy.check_models([models.get("student"), *models["devices"]])
    raw: dict[str, Any] = {name: told[name] for name in SECTIONS if name in told}
    raw["population"] = told.get("population", {})
    raw["data"] = {"augment": told.get("augment", {})}
    proxy = told.get("proxy")
    raw["proxy"] = None if proxy is None else {"size": proxy["size"], "labelled": proxy["labelled"]}
    experiment = validate(raw)
    if told.get("answer") != experiment.method.upload.__name__:
        raise ConfigError(
            f"the server awaits {told.get('answer')!r}, but {experiment.method.name} sends "
            f"{experiment.method.upload.__name__}: run one release of fedkd"
        )
    return experiment


# ---- the server -----------------------------------------------------------------------------------------------------
def server_site(experiment: Experiment, clients: int) -> Site:
    """Return the server's site: the test records and the proxy set of ``experiment``, and nobody's private records.

    Raises:
        ConfigError, DataError: as the sources do; or the method cannot run on a network.
    """
    method = experiment.method
    if method.pools_data:
        raise ConfigError(f"{method.name} pools everybody's records: it runs by `fedkd simulate` only")
    _check_secure_sum(experiment)
    split = load(experiment.data, experiment.seed)
    proxy = None
    if method.proxy != "none":
        assert experiment.proxy is not None
        split, proxy = build_proxy(experiment.proxy, split, experiment.seed)
    train, test = split.train, split.test
    if train.private:
        # Devices scale their records at home; what is public is scaled by public statistics.
        public = Standardiser.fit(proxy.x, train.scaling) if proxy is not None else train.scaling
        if public is None:
            raise ConfigError(
                "data.normalise is `per_client`, and there is neither a proxy set nor public constants to scale the "
                "server's test records by: add data.mean and data.std, or a proxy"
            )
        proxy = replace(proxy, scaling=public, private=False) if proxy is not None else None
        train = replace(train.scaled_by(public), scaled_at_home=True)
        test = test.scaled_by(public)
    return _site(experiment, train.select(slice(0, 0)), test, proxy, [0] * clients)


def _check_secure_sum(experiment: Experiment) -> None:
    """Refuse a recovery by half of the roster: a server that names different survivors to two halves would undress one."""
    if experiment.privacy.secure_sum and experiment.privacy.secure_threshold < 0.5:
        raise ConfigError(
            f"privacy.secure_threshold is {experiment.privacy.secure_threshold}: below 0.5 it trusts the server, so that a "
            "real network takes 0.5 or more"
        )


# ---- the device -----------------------------------------------------------------------------------------------------
def device_site(
    experiment: Experiment, told: Mapping[str, Any], own: Dataset, proxy: ProxySet | None, client: int, parameters: int
) -> Site:
    """Return a device's site: its own records under its own number, and the proxy set.

    Args:
        parameters: the largest model that may be built.
    Raises:
        PolicyError: a model is larger.
        ConfigError: the records do not fit the experiment.
    """
    _check_secure_sum(experiment)
    shape, classes, clients = [int(n) for n in told["shape"]], int(told["classes"]), int(told["clients"])
    if list(own.shape) != shape or own.classes > classes:
        raise ConfigError(
            f"the experiment is about inputs of shape {shape} in {classes} classes, this device's records have shape "
            f"{list(own.shape)} in {own.classes}: see data.yaml"
        )
    if not 0 <= client < clients <= 1_000_000:
        raise ConfigError(f"this is client {client} of a federation of {clients}")
    told_proxy = experiment.proxy
    if proxy is not None and told_proxy is not None:
        right = len(proxy) == told_proxy.size and (proxy.y is not None) == told_proxy.labelled
        if not right:
            raise ConfigError("the proxy set that came is not the one that the experiment speaks of")
    devices = experiment.models.devices
    for name in {devices[client % len(devices)], experiment.models.student}:
        size = model_size(name, own.shape, classes)
        if size > parameters:
            raise PolicyError(f"model {name!r} has {size} parameters, this node's policy allows {parameters}")
    counts = [0] * clients
    counts[client] = len(own)
    return _site(experiment, replace(own, classes=classes), own.select(slice(0, 0)), proxy, counts)


def model_size(name: str, shape: tuple[int, ...], classes: int) -> int:
    """Return the number of parameters of a model without reserving memory for them; 0 for one that is no torch model."""
    if ":" in name:
        return 0  # only this node's own policy names such a model
    with torch.device("meta"):
        model = resolve(name)(shape, classes)
    return sum(parameter.numel() for parameter in model.parameters()) if isinstance(model, torch.nn.Module) else 0


def _site(experiment: Experiment, train: Dataset, test: Dataset, proxy: ProxySet | None, sizes: list[int]) -> Site:
    """One party's federation: device k holds the first ``sizes[k]`` records; only one size is not 0."""
    parts = tuple(np.arange(size, dtype=np.int64) for size in sizes)
    counts = np.stack([np.bincount(train.y[part], minlength=train.classes) for part in parts])
    site = Site(experiment, Federation(Split(train, test), parts, proxy, counts))
    site.tells_why = False
    return site
