"""Published tables re-run: ``python -m simulations.papers.run [fedgen_table1|fedproto_mnist|all]``.

Settings stand in the YAML files beside this one, each with what the paper says and what it leaves open. The paper's figure
stands beside ours, mean and deviation over the seeds. Finished runs in ``--out`` are reused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.tables import HERE, made_with, percent, run

Row = tuple[str, str, list[str], str, str]
"""(label, YAML, overrides, published figure, which of our accuracies stands beside it)"""

TABLES: dict[str, list[Row]] = {
    "fedgen_table1": [
        ("FedAvg alpha 0.1", "fedgen-fedavg.yaml", ["partition.alpha=0.1"], "90.16", "student"),
        ("FedAvg alpha 1", "fedgen-fedavg.yaml", ["partition.alpha=1.0"], "93.84", "student"),
        ("FD alpha 0.1", "fedgen-fd.yaml", ["partition.alpha=0.1"], "64.11±1.36", "clients_own_classes_mean"),
        ("FD alpha 1", "fedgen-fd.yaml", ["partition.alpha=1.0"], "79.88±0.66", "clients_own_classes_mean"),
        ("FedDF alpha 0.1", "fedgen-feddf.yaml", ["partition.alpha=0.1"], "91.11", "student"),
        ("FedDF alpha 1", "fedgen-feddf.yaml", ["partition.alpha=1.0"], "93.37", "student"),
    ],
    "fedproto_mnist": [
        ("FedProto 3±2 ways", "fedproto-mnist.yaml", [], "about 97.1 (unverified)", "clients_own_classes_mean"),
    ],
}


def main(argv: list[str] | None = None) -> None:
    """Run the tables named, print them and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="all", choices=[*TABLES, "all"])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="folder of the runs")
    parser.add_argument("--json", type=Path, default=HERE / "papers" / "results.json")
    parser.add_argument("--small", action="store_true", help="one quick round on the bundled digits")
    words = parser.parse_args(argv)
    seeds = [int(s) for s in words.seeds.split(",")]
    found: dict[str, Any] = {}
    for name in TABLES if words.name == "all" else [words.name]:
        table = Table(title=name + (" (small form: digits, one round)" if words.small else ""))
        for title in (
            "row",
            "published",
            "ours",
            "measured on",
            "student",
            "devices",
            "own classes",
            "ensemble",
            "min",
        ):
            table.add_column(title)
        for label, file, overrides, published, key in TABLES[name]:
            suffix = "-" + overrides[0].replace("partition.", "").replace("=", "") if overrides else ""
            row = run(HERE / "papers" / file, overrides, seeds, words.out / f"{Path(file).stem}{suffix}", words.small)
            found[label] = {"published": published, "measured_on": key, **row}
            four = [percent(row[k]) for k in ("student", "clients_mean", "clients_own_classes_mean", "ensemble")]
            minutes = row["seconds"] * len(seeds) / 60
            table.add_row(label, published, percent(row[key]), key, *four, f"{minutes:.1f}")
        Console(width=150).print(table)
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps({"seeds": seeds, "versions": made_with(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
