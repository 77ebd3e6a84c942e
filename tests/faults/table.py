"""The table of the twenty faults: which tests inject each, what happened, and whether it was survived.

``pytest -m fault --faults`` runs the marked tests, the slow ones too, and prints it. A test says which fault it injects by
``@pytest.mark.fault(number, "what happens")``, or says what it saw by the fixture ``happened``. The command ends with an
error where a fault has no test that passed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

FAULTS = {
    1: "NaN or infinity in soft labels",
    2: "wrong number of samples or classes",
    3: "sample ids permuted, or of another proxy set",
    4: "negative or unnormalised probabilities",
    5: "logits of 1e30",
    6: "types other than the contract's",
    7: "a header that claims 1e12 elements",
    8: "a message over the cap; a compressed bomb",
    9: "truncated bytes; trailing bytes",
    10: "a duplicate or replayed upload",
    11: "a stale or a future round",
    12: "example counts of 0, negative, NaN, 1e18",
    13: "unknown, expired, wrong-CA, not yet valid certificate",
    14: "client A speaking as client B",
    15: "kill -9 of the server while it writes a checkpoint",
    16: "kill -9 of a client in an upload or while it spends budget",
    17: "a full disk; a read-only disk",
    18: "a checkpoint with a flipped bit, a pickle, a path ../../x",
    19: "stragglers; fewer than the minimum; everyone drops",
    20: "colluders, a constant predictor, an empty data set",
}


@dataclass
class _Row:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    happened: list[str] = field(default_factory=list)

    @property
    def survived(self) -> str:
        if self.failed:
            return "NO"
        return "yes" if self.passed else "not tested"


class Table:
    """Gathers the reports of marked tests."""

    def __init__(self) -> None:
        self.rows = {number: _Row() for number in FAULTS}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):  # type: ignore[no-untyped-def]
        report = yield
        marks = [mark.args for mark in item.iter_markers("fault")]
        if marks and (report.when == "call" or report.outcome != "passed"):
            said = [text for name, text in item.user_properties if name == "happened"]
            for number, *words in marks:
                row = self.rows[number]
                setattr(row, report.outcome, getattr(row, report.outcome) + 1)
                if report.outcome != "passed":
                    continue
                row.happened += [text for text in said or words if text not in row.happened]
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("the twenty faults")
        write(f"{'':>2}  {'fault':<58} {'tests':>7}  survived")
        for number, row in self.rows.items():
            tests = f"{row.passed}/{row.passed + row.failed}"
            write(f"{number:>2}  {FAULTS[number]:<58} {tests:>7}  {row.survived}")
            for text in row.happened:
                for line in textwrap.wrap(text, 108, initial_indent="- ", subsequent_indent="  "):
                    write(f"      {line}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if any(row.survived != "yes" for row in self.rows.values()) and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="print the table of the twenty faults")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--faults"):
        config.pluginmanager.register(Table(), "fedkd-faults")


@pytest.fixture
def happened(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say in a sentence what a fault led to; it stands in the table."""
    return lambda text: record_property("happened", text)
