"""Lower bounds on epsilon of correct and of broken mechanisms: ``python -m simulations.benchmarks.mechanism_audit``.

Each mechanism claims epsilon 4 at delta 1e-5 for one release, and is run 20,000 times with and 20,000 times without the worst
unit, as ``fedkd audit`` does: as it is, with half of its noise, and with a share of one unit 1.5 times as long as its clip
allows. An audit is right where the bound of a correct mechanism stays under the claim and those of the broken ones exceed it.
Noise comes from the system's entropy, so that figures differ a little from one time to the next.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from fedkd.experiment import load
from fedkd.privacy import client_level, stacked_dpsgd
from fedkd.privacy.audit.mechanism import RUNS, audit_mechanism
from fedkd.privacy.noise import NoiseSource
from fedkd.site import Site
from simulations.tables import HERE, made_with

CLAIM, LOOSE = 4.0, 1.5
MECHANISMS = {
    "labels": ["privacy.kind=labels", f"privacy.epsilon={CLAIM}"],
    "votes": ["privacy.kind=votes", f"privacy.epsilon={CLAIM}"],
    "dp_sgd": [
        "privacy.kind=dp_sgd", f"privacy.epsilon={CLAIM}", "privacy.sampling_rate=1", "training.steps=1",
    ],
}  # fmt: skip


@contextmanager
def half_the_noise(kind: str) -> Iterator[None]:
    """Every mechanism draws noise of half the deviation that it accounts for."""
    real = NoiseSource.normal_
    with mock.patch.object(NoiseSource, "normal_", lambda self, out: real(self, out).mul_(0.5)):
        yield


@contextmanager
def loose_clip(kind: str) -> Iterator[None]:
    """One unit moves the sum 1.5 times as far as the account believes."""
    if kind == "votes":
        votes = client_level.count_votes
        with mock.patch.object(client_level, "count_votes", lambda *words: LOOSE * votes(*words)):
            yield
        return
    place: Any = client_level if kind == "labels" else stacked_dpsgd
    name, at = ("clipped_sum", 3) if kind == "labels" else ("clipped_sums", 2)
    real = getattr(place, name)

    def loose(*words: Any) -> Any:
        return real(*words[:at], LOOSE * words[at], *words[at + 1 :])

    with mock.patch.object(place, name, loose):
        yield


@contextmanager
def as_it_is(kind: str) -> Iterator[None]:
    """No fault."""
    yield


FAULTS: dict[str, Callable[[str], Any]] = {
    "as it is": as_it_is,
    "half the noise": half_the_noise,
    "clip 1.5 times too large": loose_clip,
}


def main(argv: list[str] | None = None) -> None:
    """Audit every mechanism with every fault, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help="releases without, and as many with the worst unit")
    parser.add_argument("--times", type=int, default=3, help="audits of each")
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "mechanism_audit.json")
    parser.add_argument("--only", default=",".join(MECHANISMS), help="comma list of mechanisms")
    words = parser.parse_args(argv)
    rows: dict[str, dict[str, Any]] = {}
    table = Table(title=f"epsilon at least, at 95 %; {CLAIM:g} is claimed; {words.runs:,} runs, {words.times} times")
    for title in ("mechanism", *FAULTS, "caught"):
        table.add_column(title, justify="left" if title == "mechanism" else "right")
    for kind in words.only.split(","):
        overrides = MECHANISMS[kind]
        common = ["rounds=1", "proxy_per_round=20", "algorithm.aggregation=mean", *overrides]
        experiment = load(HERE / "digits-votes-dp.yaml", common)[0][1]
        site, rows[kind] = Site.load(experiment), {}
        for fault, broken in FAULTS.items():
            found = []
            for _ in range(words.times):
                with broken(kind):
                    audit = audit_mechanism(experiment, site, words.runs)
                assert audit is not None
                found.append(audit)
            bounds = [audit.bound for audit in found]
            rows[kind][fault] = {
                "claimed": found[0].claimed,
                "bounds": bounds,
                "any_mechanism": [audit.bound_any for audit in found],
                "runs": found[0].runs,
                "refuted": sum(not audit.holds for audit in found),
            }
        cells = [f"{np.mean(r['bounds']):.2f} ± {np.std(r['bounds']):.2f}" for r in rows[kind].values()]
        caught = " / ".join(f"{r['refuted']} of {words.times}" for r in rows[kind].values())
        table.add_row(kind, *cells, caught)
    Console(width=120).print(table)
    told = {"claim": CLAIM, "delta": 1e-5, "versions": made_with(), "rows": rows}
    words.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
