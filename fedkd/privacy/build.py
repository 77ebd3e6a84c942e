"""From an experiment to its mechanism."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.privacy.ledger import Ledger
from fedkd.privacy.mechanisms import Mechanism, NoPrivacy
from fedkd.privacy.policy import Policy

if TYPE_CHECKING:
    from fedkd.experiment import Experiment
    from fedkd.site import Site

LEDGER = "privacy/ledger.jsonl"
"""Where a run keeps its ledger, below its folder."""


def build(experiment: Experiment, *, clients: int, queries: int, classes: int) -> Mechanism:
    """Return the mechanism that the section ``privacy:`` asks for, its noise calibrated.

    Args:
        clients: devices of the federation. queries: proxy samples asked in a round.
    Raises:
        ConfigError: the budget cannot be kept.
    """
    kind = experiment.privacy.kind
    if experiment.privacy.secure_sum:
        from fedkd.privacy.secure.mechanism import SecureSum

        inner = (
            _plain(experiment, clients=clients, queries=queries, classes=classes) if kind == "dp_sgd" else NoPrivacy()
        )
        return SecureSum(experiment, inner, clients=clients, queries=queries, classes=classes)
    return _plain(experiment, clients=clients, queries=queries, classes=classes)


def _plain(experiment: Experiment, *, clients: int, queries: int, classes: int) -> Mechanism:
    kind = experiment.privacy.kind
    if kind == "none":
        return NoPrivacy()
    if kind == "dp_sgd":
        from fedkd.privacy.record_level import DpSgd

        return DpSgd(experiment)
    from fedkd.privacy.client_level import ConfidentGnmax, GaussianLabels

    chosen = GaussianLabels if kind == "labels" else ConfidentGnmax
    return chosen(experiment, clients=clients, queries=queries, classes=classes)


def open_ledger(site: Site, folder: Path, life: Path | None = None) -> None:
    """Let a simulation charge the ledger of the run in ``folder``, under the policy that the experiment names.

    Args:
        life: ledger of all runs of a real server, whose clients stay the same people from run to run.
    Raises:
        LedgerError: the ledger was tampered with. PolicyError: the experiment goes beyond the policy.
    """
    privacy = site.experiment.privacy
    if privacy.kind == "none" and privacy.policy is None:
        return
    policy = None
    if privacy.policy is not None:
        policy = Policy.load(Path(privacy.policy))
        policy.check_experiment(site.experiment, site.proxy.identity if site.proxy is not None else None)
    if privacy.kind != "none":
        whole = None if life is None else Ledger(life)
        site.mechanism.open(Ledger(folder / LEDGER, whole), policy)
