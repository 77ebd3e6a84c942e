"""``fedkd audit``: attack a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table


def audit(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    canaries: Annotated[int, typer.Option(min=20, help="Canaries; at most a third of the training records.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the choice of canaries and their coins.")] = 0,
    shadows: Annotated[
        int,
        typer.Option(
            min=0,
            help="Runs with other coins, which sharpen the attacks on labels and student; each takes the run's time.",
        ),
    ] = 4,
    runs: Annotated[
        int | None, typer.Option(min=100, help="Releases in the mechanism's audit; default 20,000.")
    ] = None,
) -> None:
    """Attack a finished run: AUC, TPR at 1 % FPR and a lower bound on epsilon, beside the claim.

    The run is repeated from its configuration with canaries in the training; nothing is charged to its ledger.
    """
    from fedkd.cli.main import out
    from fedkd.privacy.audit.run import AUDIT, audit_run

    show(audit_run(run, canaries=canaries, seed=seed, runs=runs, shadows=shadows))
    out.print(f"audit: {run / AUDIT}", highlight=False, soft_wrap=True)


def show(found: dict[str, Any]) -> None:
    """Print an audit."""
    from fedkd.cli.main import out

    table = Table(box=None, header_style="bold", pad_edge=False, title=None)
    for name in ("view", "attacker", "AUC", "TPR at 1 % FPR", "epsilon at least", "epsilon claimed"):
        table.add_column(name, justify="left" if name in ("view", "attacker") else "right")
    for view in found["views"]:
        table.add_row(
            view["name"],
            view["who"],
            f"{view['auc']:.3f}",
            f"{view['tpr_at_1_percent_fpr']:.3f}",
            f"{view['epsilon']:.2f}",
            claimed_text(view["claimed"]),
        )
    shadows = f", and {found['shadows']} more with other coins" if found["shadows"] else ""
    out.print(f"{found['canaries']} canaries; {found['rerun']}{shadows}", highlight=False, soft_wrap=True)
    out.print(table)
    if found["held"] is not None:
        out.print(found["held"], highlight=False, soft_wrap=True)
    out.print(claims_line(found), highlight=False, soft_wrap=True)
    labels = found["label_inference"]
    if labels is not None:
        out.print(
            f"label distributions from soft labels: total variation {labels['attack']:.3f} to the truth; "
            f"{labels['prior']:.3f} by guessing the mean",
            highlight=False,
        )
    mechanism = found["mechanism"]
    if mechanism is not None:
        out.print(
            f"mechanism, {mechanism['what']}, {mechanism['runs']:,} times: epsilon at least {mechanism['bound']:.2f}, "
            f"claimed {mechanism['claimed']:.2f}",
            highlight=False,
        )
    out.print(found["verdict"], highlight=False)


def claims_line(found: dict[str, Any]) -> str:
    """Return what the run claims, what its ledger says, and what its repetition, which was attacked, claims."""
    run = found["run"]
    told = (run["epsilon"], run["ledger"], found["claim"]["epsilon"])
    return "epsilon of the run {}, of its ledger {}, of its repetition {}".format(*map(claimed_text, told))


def claimed_text(value: float | None) -> str:
    """Return a claim for a table: a dash where there is none."""
    return "none" if value is None else f"{value:.2f}"
