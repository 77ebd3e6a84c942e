"""Audit a run's folder: the attacks, the claim beside them, and what to make of both, as JSON in the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError
from fedkd.experiment import Experiment, read_yaml, validate
from fedkd.privacy.audit.attack import CANARIES, Rerun, label_inference, membership, outside, rerun
from fedkd.privacy.audit.bounds import CONFIDENCE
from fedkd.privacy.audit.mechanism import MechanismAudit, audit_mechanism
from fedkd.privacy.build import LEDGER
from fedkd.privacy.events import epsilon
from fedkd.privacy.ledger import SERVER, Ledger
from fedkd.simulate import CONFIG, SUMMARY
from fedkd.storage import write_json

AUDIT, SCHEMA = "audit.json", 1

TOLERANCE = 1e-6
"""Claims that differ by less are the same, in other digits of floats."""

TRUSTED = "the claim leaves this view out: it is the trusted server's"


def audit_run(
    folder: Path, *, canaries: int = CANARIES, seed: int = 0, runs: int | None = None, shadows: int = 0
) -> dict[str, Any]:
    """Attack the run in ``folder``, write ``audit.json`` into it, and return what it holds.

    Args:
        canaries: wanted number of canaries. seed: of their choice and coins. runs: releases in the audit of the mechanism.
        shadows: runs with other coins, which sharpen the attacks on what leaves the server; each takes as long as the run.
    Raises:
        ConfigError: the folder holds no finished run, or one whose data are too few.
    """
    if not (folder / CONFIG).is_file() or not (folder / SUMMARY).is_file():
        raise ConfigError(f"{folder} holds no finished run: expected {CONFIG} and {SUMMARY} in it")
    experiment = validate(read_yaml(folder / CONFIG))
    if experiment.method.pools_data:
        raise ConfigError(f"{experiment.method.name} pools everybody's records on purpose: there is nothing to audit")
    again = rerun(experiment, canaries, seed)
    known = [outside(rerun(experiment, canaries, seed, coins + 1)) for coins in range(shadows)]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "confidence": CONFIDENCE,
        "claim": again.site.mechanism.claim().to_json(),
        "run": _published(folder, experiment),
        "canaries": len(again.canaries),
        "seed": seed,
        "shadows": shadows,
        "rerun": (
            "the run was repeated from its configuration with canaries: training records with a wrong label, each of "
            "which a coin left in or out"
        ),
        "views": _views(again, known),
        "held": _held(again),
    }
    labels = label_inference(again)
    found["label_inference"] = None if labels is None else {"attack": labels.attack, "prior": labels.prior}
    mechanism = audit_mechanism(experiment, again.site, runs, len(found["views"]) + 1)
    found["mechanism"] = None if mechanism is None else mechanism.to_json()
    found["verdict"] = _verdict(found, mechanism)
    write_json(folder / AUDIT, found)
    return found


def _published(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Return what the run itself claims, and what its own ledger says: epsilon each, None for none or infinity."""
    summary = json.loads((folder / SUMMARY).read_text())
    told = {"finished": summary.get("status") == "finished", "epsilon": summary.get("epsilon"), "ledger": None}
    privacy = experiment.privacy
    if privacy.unit is not None and (folder / LEDGER).is_file():
        spent = Ledger(folder / LEDGER).spent(privacy.delta, disjoint=privacy.disjoint)
        told["ledger"] = next((s.epsilon for s in spent if s.unit == privacy.unit and not s.void), None)
    return told


def _contradictions(found: Mapping[str, Any]) -> list[str]:
    """Say where the run's claim, its ledger and the claim of its repetition do not go together."""
    run, again = found["run"], found["claim"]["epsilon"]
    if run["epsilon"] is None:
        return []
    said = []
    if run["ledger"] is None and run["epsilon"] > 0:
        said.append(f"the run claims epsilon {run['epsilon']:.3f}, and no ledger shows it")
    if run["ledger"] is not None and run["ledger"] > run["epsilon"] + TOLERANCE:
        said.append(f"the run claims epsilon {run['epsilon']:.3f}, its ledger holds {run['ledger']:.3f}")
    if run["finished"] and again is not None and again > run["epsilon"] + TOLERANCE:
        said.append(f"the run claims epsilon {run['epsilon']:.3f}, its repetition {again:.3f}")
    return said


def _views(again: Rerun, shadows: Sequence[Mapping[str, NDArray[np.floating]]]) -> list[dict[str, Any]]:
    """Every view with the epsilon that its bound is held against; None where the claim does not speak of it."""
    limit = _limit(again)
    trusted = again.site.mechanism.unit == "client" and not again.site.mechanism.sums_securely
    views = []
    for view in membership(again, shadows):
        covered = limit is not None and not (trusted and view.name in ("soft labels", "local model"))
        covered = covered and not (again.site.mechanism.unit == "client" and view.name == "local model")
        views.append(
            {
                **view.to_json(),
                "claimed": limit if covered else None,
                "note": TRUSTED if limit is not None and not covered else None,
            }
        )
    return views


def _limit(again: Rerun) -> float | None:
    """Return the epsilon that the claim grants a canary, which is one record there or not.

    Where the unit is a client, a record more or less makes its client another one: epsilon under replacing a client.
    """
    mechanism = again.site.mechanism
    claim = mechanism.claim()
    if claim.epsilon is None or claim.unit is None or claim.delta is None:
        return None
    if claim.unit == "record" or claim.relation == "replace_one":
        return claim.epsilon
    party = SERVER if not mechanism.sums_securely else mechanism.ledger.devices[0][0]
    found = epsilon(mechanism.ledger.events(party, "client"), claim.delta, "replace_one")
    return found if math.isfinite(found) else None


def _held(again: Rerun) -> str | None:
    """Say why the bounds are held against another epsilon than the run's, if they are."""
    claim, limit = again.site.mechanism.claim(), _limit(again)
    if limit is None or claim.epsilon is None or claim.unit == "record" or claim.relation == "replace_one":
        return None
    return (
        f"A canary more or less makes its client another one: bounds are held against epsilon {limit:.2f}, which is that of "
        f"replacing a client. The run's {claim.epsilon:.2f} is that of a client more or less."
    )


def _verdict(found: dict[str, Any], mechanism: MechanismAudit | None) -> str:
    broken = [v["name"] for v in found["views"] if v["claimed"] is not None and v["joint"] > v["claimed"]]
    if mechanism is not None and not mechanism.holds:
        broken.append(f"mechanism ({mechanism.what})")
    wrong = _contradictions(found)
    if broken:
        wrong.append(f"the claim is refuted at {100 * CONFIDENCE:g} % confidence by: {', '.join(broken)}")
    if wrong:
        return "; ".join(wrong)
    if found["claim"]["epsilon"] is None:
        leaks = [v["name"] for v in found["views"] if v["joint"] > 0]
        return "nothing is claimed" + (f"; the attack found a leak in: {', '.join(leaks)}" if leaks else "")
    return "no attack refutes the claim; that proves nothing beyond these attacks"
