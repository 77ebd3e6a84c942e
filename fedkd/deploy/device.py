"""What a device does with a request: its own policy first, then the library's procedure, then the outbox.

The lean node and Flower's own SuperNode both end here. Everything lies below the kit's ``state`` folder: the answers and
models of each run, the proxy sets that came, and one privacy ledger for the device's whole life.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedkd.data import Dataset, ProxySet
from fedkd.deploy.kit import ClientKit
from fedkd.deploy.localdata import LocalData, read_local_data
from fedkd.deploy.mail import Ask, Say
from fedkd.deploy.outbox import Outbox
from fedkd.deploy.policy import NodePolicy, read_policy
from fedkd.deploy.sums import SumRegister
from fedkd.envelope import PayloadError
from fedkd.errors import ConfigError, DataError, FedkdError, kind_of
from fedkd.labeller import OWN
from fedkd.privacy.policy import PolicyError
from fedkd.privacy.secure.heads import SERVER, is_message, read, read_step, session_id
from fedkd.storage import StorageError, write_atomic

log = logging.getLogger("fedkd.deploy.client.device")

RUN_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,127}$")
RUNS, PROXIES, LEDGER, SUMS = "runs", "proxies", "privacy/ledger.jsonl", "privacy/sums.json"
ROUNDS_KEPT = 8
"""A server that falls back to an older checkpoint asks older rounds again, and finds the device as it was then."""
RUNS_KEPT = 8
PROXIES_KEPT = 4


class Refused(FedkdError):
    """This device does not answer a request. ``reason`` is a short code that the server is told with the words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Desk(Protocol):
    """A run at hand: this device trains for it (:class:`_Desk`), or only labels (:class:`fedkd.deploy.light.LabelDesk`)."""

    @property
    def rounds(self) -> int: ...

    def respond(self, ask: Ask) -> tuple[bytes | None, str | None]:
        """Return the answer, or why there is none."""


class NeedsProxy(FedkdError):
    """The proxy set that a request is about has not come yet."""


@contextmanager
def _of_the_request() -> Iterator[None]:
    """Let errors of what the server sent be told to it in words: no record was looked at yet."""
    try:
        yield
    except (ConfigError, DataError, PayloadError) as cause:
        raise Refused("device", str(cause)) from cause


class Device:
    """One party of a real network.

    Raises:
        ConfigError: the kit's data.yaml or policy.yaml cannot be read. A device without them must not start.
    """

    def __init__(self, kit: ClientKit) -> None:
        self.id, self.state = kit.id, kit.state
        self.policy: NodePolicy = read_policy(kit.path("policy.yaml"))
        self.local: LocalData = read_local_data(kit.path("data.yaml"))
        self.delivered: set[str] = set()
        self._records: Dataset | None = None
        self._predictor = self.local.model.load(kit.folder) if self.local.model is not None else None
        self._desk: tuple[tuple[str, str], Desk] | None = None

    def handle(self, ask: Ask) -> Say:
        """Answer a request; whatever goes wrong becomes an answer in words."""

        def say(kind: str, reason: str = "", message: str = "", answer: bytes | None = None) -> Say:
            return Say(
                kind=kind,  # type: ignore[arg-type]
                run=ask.run, client=self.id, round=ask.round, key=ask.key, reason=reason, message=message, answer=answer,
            )  # fmt: skip

        try:
            box = Outbox(self._run_folder(ask) / "outbox")
            if ask.kind == "probe":
                if ask.key in self.delivered:
                    return say("known")
                waiting = box.find(ask.round, ask.key)
                return say("unknown") if waiting is None else say("answer", answer=waiting)
            known = box.find(ask.round, ask.key)
            if known is not None:
                log.info("round %d of %s was asked again: the same answer is sent again", ask.round, ask.run)
                return say("answer", answer=known)
            answer = self._answer(ask)
            box.put(ask.round, ask.key, answer)
            return say("answer", answer=answer)
        except NeedsProxy:
            return say("needs")
        except Refused as cause:
            log.warning("round %d of %s refused (%s): %s", ask.round, ask.run, cause.reason, cause)
            return say("refused", cause.reason, str(cause))
        except PolicyError as cause:
            log.warning("round %d of %s refused by this node's policy: %s", ask.round, ask.run, cause)
            return say("refused", "policy", str(cause))
        except StorageError as cause:
            log.warning("round %d of %s failed: %s", ask.round, ask.run, cause)
            return say("refused", "device", str(cause))
        except Exception as cause:
            # Words may quote values of records, and those of reading records do; the server hears the kind alone.
            if isinstance(cause, FedkdError):
                log.warning("round %d of %s failed: %s", ask.round, ask.run, cause)
            else:
                log.exception("round %d of %s failed", ask.round, ask.run)
            return say("refused", "device", kind_of(cause))

    # ---- checks -----------------------------------------------------------------------------------------------------
    def _run_folder(self, ask: Ask) -> Path:
        if ask.client != self.id:
            raise Refused("identity", f"this is client {self.id}, the request is for client {ask.client}")
        if not RUN_NAME.match(ask.run):
            raise Refused("form", "the run's name is no plain name")
        if ask.round < 0 or not re.fullmatch(r"[0-9a-f]{64}", ask.key):
            raise Refused("form", "the request has no round or no key")
        return self.state / RUNS / ask.run

    def _answer(self, ask: Ask) -> bytes:
        from fedkd.wire import read_head

        size = len(ask.request) + len(ask.proxy or b"")
        if size > self.policy.max_request_bytes:
            raise PolicyError(
                f"the request has {size} bytes, this node's policy allows max_request_bytes {self.policy.max_request_bytes}"
            )
        with _of_the_request():
            if is_message(ask.request):
                # Bound to run and round by its session.
                read(ask.request, read_step(ask.request), SERVER, session_id(ask.run, ask.round))
                speaks_of = ask.run, ask.round
            else:
                envelope = read_head(ask.request).envelope
                speaks_of = envelope.run, envelope.round
        if speaks_of != (ask.run, ask.round):
            # The ledger is charged under the message's own words: they must not differ from what the answer is kept by.
            raise Refused("form", "the request's wrapping and its message speak of different rounds")
        desk = self._sit_down(ask)
        if ask.round >= desk.rounds:
            raise Refused("round", f"round {ask.round} of a run of {desk.rounds} rounds")
        answer, error = desk.respond(ask)
        if answer is None:
            raise Refused("device", error or "no answer")
        if len(answer) > self.policy.max_reply_bytes:
            raise PolicyError(
                f"the answer has {len(answer)} bytes, this node's policy allows max_reply_bytes {self.policy.max_reply_bytes}"
            )
        return answer

    # ---- the desk ---------------------------------------------------------------------------------------------------
    def _sit_down(self, ask: Ask) -> Desk:
        """Return what is at hand for a run; made once, and anew when the experiment changes."""
        place = (ask.run, hashlib.sha256(json.dumps(ask.experiment, sort_keys=True).encode()).hexdigest())
        if self._desk is not None and self._desk[0] == place:
            return self._desk[1]
        self._desk = None
        desk = self._labels(ask) if self._predictor is not None else self._trains(ask)
        self._tidy(ask.run)
        self._desk = (place, desk)
        return desk

    def _labels(self, ask: Ask) -> Desk:
        from fedkd.deploy.light import LabelDesk, read_told

        with _of_the_request():
            told = read_told(ask.experiment, self.policy)
            proxy = self._proxy(ask)
            self.policy.check_answers(told, len(proxy), proxy.identity)
            return LabelDesk.open(self.id, told, proxy, self._predictor)

    def _trains(self, ask: Ask) -> Desk:
        from fedkd.deploy.sites import read_outline

        with _of_the_request():
            experiment = read_outline(ask.experiment, self.policy)
            proxy = self._proxy(ask) if experiment.method.proxy != "none" else None
            self.policy.check(experiment, proxy.identity if proxy is not None else None)
            devices = experiment.models.devices
            if devices[self.id % len(devices)] == OWN:
                raise ConfigError(
                    f"the experiment counts on a model of client {self.id}'s own, and its data.yaml names none"
                )
        if self._records is None:
            self._records = self.local.records()
        return _Desk.open(self, ask, experiment, proxy, self._records)

    def _proxy(self, ask: Ask) -> ProxySet:
        from fedkd.deploy.outline import unpack_proxy

        told = ask.experiment.get("proxy")
        name = told.get("sha256") if isinstance(told, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{64}", name):
            raise ConfigError("the method needs a proxy set, and the server names none")
        folder = self.state / PROXIES
        path = folder / f"{name}.proxy"
        if ask.proxy is not None:
            if hashlib.sha256(ask.proxy).hexdigest() != name:
                raise DataError("the proxy set that came is not the one that the experiment names")
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, ask.proxy)
            for old in sorted(folder.glob("*.proxy"), key=lambda p: p.stat().st_mtime)[:-PROXIES_KEPT]:
                old.unlink(missing_ok=True)
        try:
            data = path.read_bytes()
        except OSError as cause:
            raise NeedsProxy("no proxy set yet") from cause
        if hashlib.sha256(data).hexdigest() != name:
            path.unlink(missing_ok=True)
            raise NeedsProxy("the proxy set on disk is damaged")
        return unpack_proxy(data, 16 * self.policy.max_request_bytes)

    def _tidy(self, run: str) -> None:
        """Forget the runs that were longest without work, so that a server cannot fill the disk with names of runs."""
        folder = self.state / RUNS
        if not folder.is_dir():
            return
        known = sorted((p for p in folder.iterdir() if p.is_dir() and p.name != run), key=lambda p: p.stat().st_mtime)
        for old in known[: max(0, len(known) - (RUNS_KEPT - 1))]:
            shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class _Desk:
    """A run at hand: site, engine and store; and the register of secure sums, where the run has them."""

    client: int
    site: object
    engine: object
    store: object
    rounds: int
    sums: SumRegister | None

    @classmethod
    def open(cls, device: Device, ask: Ask, experiment: object, proxy: ProxySet | None, own: Dataset) -> _Desk:
        """Build the site of a run, and open the device's ledger for it."""
        from fedkd.deploy.sites import device_site
        from fedkd.engines.base import SerialEngine
        from fedkd.experiment import Experiment
        from fedkd.privacy.ledger import Ledger
        from fedkd.store import FolderStore

        assert isinstance(experiment, Experiment)
        site = device_site(experiment, ask.experiment, own, proxy, device.id, device.policy.max_parameters)
        if experiment.privacy.kind == "dp_sgd" or (experiment.privacy.secure_sum and experiment.privacy.kind != "none"):
            site.mechanism.open(Ledger(device.state / LEDGER), device.policy)
        store = FolderStore(device.state / RUNS / ask.run / "models", keep=ROUNDS_KEPT)
        sums = SumRegister(device.state / SUMS) if experiment.privacy.secure_sum else None
        return cls(device.id, site, SerialEngine(site), store, experiment.rounds, sums)

    def respond(self, ask: Ask) -> tuple[bytes | None, str | None]:
        """Let the device work; returns its message, or why there is none."""
        from fedkd.client import respond
        from fedkd.messages import Request

        request = Request(self.client, ask.round, ask.request, ask.holds)
        with self.sums.turn(ask.run, ask.round, ask.request) if self.sums is not None else nullcontext() as refused:
            if refused is not None:
                return None, refused
            reply = respond(self.site, self.engine, self.store, [request])[0]  # type: ignore[arg-type]
        return reply.body, reply.error
