"""``fedkd privacy``: prices before a run, and the ledger after it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="What privacy costs before a run, and what was spent in it.")


def _out() -> Console:
    from fedkd.cli.main import out

    return out


def epsilon_line(summary: Mapping[str, Any]) -> str:
    """Return the line that says what a run may claim: epsilon, delta, unit and relation, or why there is none."""
    claim = summary.get("privacy") or {}
    if claim.get("unit") is None:
        return "infinity: no mechanism protects the answers"
    what = f"per {claim['unit']} ({claim['relation'].replace('_', ' ')}), by {claim['mechanism']}"
    note = f"; {claim['note']}" if claim.get("note") else ""
    if summary["epsilon"] is None:
        return f"infinity {what}{note}"
    where = ", largest over devices" if claim["unit"] == "record" and not note else ""
    return f"{summary['epsilon']:.3f} at delta {claim['delta']:g} {what}{where}{note}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "infinity" if math.isinf(value) else f"{value:.3f}"


@app.command()
def plan(
    words: Annotated[
        list[str] | None, typer.Argument(help="An experiment (YAML file) and overrides: key=value.")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(help="Guess: share of clients whose top class is the right one.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Guess: mean probability that clients give to the right class.")
    ] = None,
) -> None:
    """Say what the plan of an experiment costs, per mechanism, before anything runs."""
    from fedkd.cli.main import split
    from fedkd.errors import ConfigError
    from fedkd.experiment import load
    from fedkd.privacy import plan as plans
    from fedkd.site import Site

    path, overrides = split(words)
    points = load(path, overrides)
    if len(points) != 1:
        raise ConfigError("a plan is of one experiment: give no comma lists")
    experiment = points[0][1]
    site = Site.load(experiment)
    out, own = _out(), experiment.privacy
    clients, classes = len(site.cards), site.classes
    most = len(site.proxy) if site.proxy is not None else 0
    asked = experiment.proxy_per_round or most
    sizes = {"clients": clients, "queries": max(asked, 1), "classes": classes}
    out.print(
        f"{experiment.name}: {experiment.method.name}, {experiment.rounds} rounds, {clients} clients, {asked} proxy "
        f"queries a round, delta {own.delta:g}",
        highlight=False,
    )
    if own.kind == "none":
        out.print("As it stands: privacy.kind none, epsilon infinity.", highlight=False)
    budgets = [own.epsilon] if own.epsilon is not None else list(plans.GRID)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("mechanism", "unit", "noise multiplier", "one round", "the plan", "one round more", "noise"):
        table.add_column(title, overflow="fold")
    reasons = []
    for kind in plans.KINDS:
        # Given both, the noise is what the experiment says, and epsilon its limit.
        as_it_is = kind == own.kind and (own.epsilon is None or own.noise_multiplier is not None)
        priced = [None] if as_it_is else budgets
        for budget in priced:
            found = plans.cost(experiment, kind, budget, **sizes)
            if found.reason is not None:
                reasons.append((kind, found.reason))
                break
            mark = " *" if kind == own.kind else ""
            table.add_row(
                kind + mark,
                f"{found.unit}, {found.relation.replace('_', ' ')}",
                f"{found.noise_multiplier:.4g}",
                _number(found.one_round),
                _number(found.plan),
                _number(found.one_more),
                found.noise,
            )
    if table.row_count:
        out.print(table)
    if own.kind != "none":
        out.print("* the mechanism of this experiment", highlight=False)
    for kind, reason in reasons:
        out.print(f"{kind} cannot be used here: {reason}", highlight=False, soft_wrap=True)
    if most:
        _buys(out, experiment, budgets, clients, classes, most, agreement, confidence)


def _buys(
    out: Console,
    experiment: Any,
    budgets: list[float],
    clients: int,
    classes: int,
    most: int,
    agreement: float | None,
    confidence: float | None,
) -> None:
    from fedkd.privacy import plan as plans

    agreement = plans.AGREEMENT if agreement is None else agreement
    confidence = plans.CONFIDENCE if confidence is None else confidence
    out.print()
    out.print(
        f"Labels or votes, if {agreement:.0%} of the clients vote right and give the right class a probability of "
        f"{confidence:.0%} (guesses: --agreement, --confidence):",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("epsilon", "labels: queries", "right", "worth", "votes: queries", "right", "worth", "better buy"):
        table.add_column(title)
    for budget in budgets:
        labels, votes = plans.best_buys(
            experiment,
            budget,
            clients=clients,
            classes=classes,
            most=most,
            agreement=agreement,
            confidence=confidence,
        )
        better = max(labels, votes, key=lambda b: b.worth)
        table.add_row(
            f"{budget:g}",
            str(labels.queries),
            f"{labels.right:.0%}",
            f"{labels.worth:.0f}",
            str(votes.queries),
            f"{votes.right:.0%}",
            f"{votes.worth:.0f}",
            f"{better.kind}: proxy_per_round={better.queries}",
        )
    out.print(table)
    out.print(
        "worth: clean labels that would teach as much. Rounds repeat the price of every query: with few clients, one "
        "round is the best buy.",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a ledger file.")],
    delta: Annotated[float | None, typer.Option(help="Delta of the figures; default: the run's.")] = None,
    device: Annotated[int | None, typer.Option(help="Only releases of this device.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print lines of JSON.")] = False,
) -> None:
    """List every release: what, when, mechanism, unit, relation, and the epsilon composed so far."""
    from fedkd.errors import ConfigError
    from fedkd.experiment import read_yaml, validate
    from fedkd.privacy.build import LEDGER
    from fedkd.privacy.config import PrivacyConfig
    from fedkd.privacy.ledger import Ledger

    path = run / LEDGER if run.is_dir() else run
    privacy = PrivacyConfig()
    if (run / "config.yaml").is_file():
        privacy = validate(read_yaml(run / "config.yaml")).privacy
    if not path.is_file():
        if run.is_dir() and (run / "config.yaml").is_file() and privacy.kind == "none":
            _out().print("No ledger: privacy.kind is none, so that epsilon is infinity.", highlight=False)
            return
        raise ConfigError(f"{run} holds no ledger: expected {LEDGER} in a run's folder, or a ledger file")
    book, chosen = Ledger(path), delta if delta is not None else privacy.delta
    rows = _rows(book, chosen, privacy.disjoint, device)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    out = _out()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("time", "round", "who", "what", "mechanism", "event", "unit, relation", "epsilon so far"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(
            row["time"][:19].replace("T", " "),
            str(row["round"]),
            row["who"],
            row["what"],
            row["mechanism"],
            row["event"],
            f"{row['unit']}, {row['relation'].replace('_', ' ')}",
            "void" if row["void"] else _number(math.inf if row["epsilon"] is None else row["epsilon"]),
        )
    out.print(table)
    for spent in book.spent(chosen, disjoint=privacy.disjoint):
        figure = "void: noise followed the seed" if spent.void else _number(spent.epsilon)
        most = ", the largest over devices" if spent.unit == "record" and privacy.disjoint else ""
        out.print(
            f"epsilon per {spent.unit} ({spent.relation.replace('_', ' ')}): {figure} at delta {chosen:g}{most}",
            highlight=False,
        )


def _rows(book: Any, delta: float, disjoint: bool, device: int | None) -> list[dict[str, Any]]:
    """Return a row per line of the ledger, each with the epsilon composed up to and with it."""
    from fedkd.privacy.ledger import SERVER, Ledger

    so_far = Ledger()
    rows = []
    for entry in book.entries:
        if device is not None and device not in entry.devices:
            continue
        so_far.charge([entry])
        if device is not None:
            spent = [s for s in so_far.spent(delta) if s.unit == entry.unit]
            value = so_far.epsilon(delta, device, entry.unit)
        else:
            spent = [s for s in so_far.spent(delta, disjoint=disjoint) if s.unit == entry.unit]
            value = spent[0].epsilon
        ranges = entry.to_json()["devices"]
        who = ", ".join("server" if a == SERVER else f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
        rows.append(
            {
                "time": entry.time,
                "run": entry.run,
                "round": entry.round,
                "who": who,
                "what": entry.what,
                "mechanism": entry.mechanism,
                "event": str(entry.event),
                "unit": entry.unit,
                "relation": entry.relation,
                "epsilon": None if math.isinf(value) else value,
                "delta": delta,
                "void": spent[0].void,
            }
        )
    return rows
