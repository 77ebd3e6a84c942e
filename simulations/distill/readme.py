"""Writes the tables of README.md from the results: ``python -m simulations.distill.readme``."""

from __future__ import annotations

import json
import re

from simulations.distill.common import HERE, RESULTS, table

BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str) -> str:
    """Return the page with every table as the results say."""

    def one(match: re.Match[str]) -> str:
        found = json.loads((RESULTS / f"{match[2]}.json").read_text())
        seeds = ", ".join(map(str, found["seeds"]))
        note = (
            f"Seeds {seeds}; {found['seconds'] / 60:.0f} minutes.\n" if found["seconds"] >= 60 else f"Seeds {seeds}.\n"
        )
        return f"{match[1]}{table(found)}\n\n{note}{match[3]}"

    return BLOCK.sub(one, text)


def main() -> None:
    """Rewrite the page."""
    page = HERE / "README.md"
    page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
