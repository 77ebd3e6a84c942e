"""Progress of runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedkd.experiment import Experiment
from fedkd.simulate import Watch


class Announcer:
    """Makes a watcher for every run of a sweep."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def __call__(self, name: str, experiment: Experiment) -> Watch:
        """Return the watcher of one run of a sweep."""
        return self._watch(f"{experiment.method.name} {name}")

    def single(self) -> Watch:
        """Return the watcher of a run that stands alone."""
        return self._watch("")

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _watch(self, title: str) -> Watch:
        if not self._console.is_terminal:
            return lambda record, rounds: self._line(title, record, rounds)
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
        # The bars of points that are done make room: a sweep may have more points than the terminal has lines.
        for done in [task for task in self._bar.tasks if task.finished]:
            self._bar.console.print(f"{done.description}  {done.fields['said']}", highlight=False, soft_wrap=True)
            self._bar.remove_task(done.id)
        bar, task = self._bar, self._bar.add_task(title or "rounds", total=None, said="")
        return lambda record, rounds: self._advance(bar, task, record, rounds)

    def _advance(self, bar: Progress, task: TaskID, record: Mapping[str, Any], rounds: int) -> None:
        bar.update(task, total=rounds, completed=record["round"] + 1, said=said(record))

    def _line(self, title: str, record: Mapping[str, Any], rounds: int) -> None:
        head = f"{title} " if title else ""
        self._console.print(
            f"{head}round {record['round'] + 1}/{rounds}  {said(record)}", highlight=False, soft_wrap=True
        )


def said(record: Mapping[str, Any]) -> str:
    """Return one round in a few words."""
    words = []
    if record["student_accuracy"] is not None:
        words.append(f"student {100 * record['student_accuracy']:.1f} %")
    if record["clients_accuracy"] is not None:
        known = [a for a in record["clients_accuracy"] if a is not None]
        words.append(f"devices {100 * sum(known) / max(len(known), 1):.1f} %")
    if record["failed"]:
        words.append(f"failed: {record['failed']}")
    if record["answered"] is not None:
        words.append(f"{record['answered']} answers")
    if record["quarantined"]:
        words.append(f"{len(record['quarantined'])} quarantined")
    if record["asked"] is not None:
        words.append(f"{(record['bytes_up'] + record['bytes_down']) / 1e6:.2f} MB")
    return ", ".join(words)
