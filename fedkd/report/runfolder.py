"""Reading what a run leaves behind: one run folder, a sweep of them, and the seeds that belong together.

The format is written down in `docs/run-folder.md`. Reading is lenient where a run may honestly be incomplete
(it is still going, or the power went) and strict where something is wrong (a broken line in the middle, a
newer schema). Nothing here imports torch, so that a report of ten runs opens at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self

import yaml

from fedkd.errors import FedkdError
from fedkd.storage import make_folder, write_atomic

SCHEMA = 1
CONFIG_FILE = "config.yaml"
PARTITION_FILE = "partition.json"
ROUNDS_FILE = "rounds.jsonl"
SUMMARY_FILE = "summary.json"
SWEEP_FILE = "sweep.json"

# Settings that say how a run was kept or how fast it went, not what it computed: they never keep two
# seeds apart.
_NOT_SCIENCE = frozenset({"seed", "checkpoint", "runner", "out", "output", "folder", "workers", "resume"})


# --- small, forgiving conversions
# ---------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    """A finite float, or None for null, for NaN and for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: object) -> int:
    number = _number(value)
    return 0 if number is None else int(number)


def _items(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _table(value: object) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file, or a `FedkdError` that says what to do."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as problem:
        raise FedkdError(
            f"Expected to read {path}, but {problem.strerror or problem}; give the folder of a run or of a sweep."
        ) from None
    except ValueError as problem:
        raise FedkdError(
            f"Expected JSON in {path}, but it cannot be read ({problem}); if the run was cut off while it"
            f" wrote, delete"
            " this file and the report is made from what is left."
        ) from None
    if not isinstance(content, dict):
        raise FedkdError(
            f"Expected a JSON object in {path}, but found a {type(content).__name__}; docs/run-folder.md"
            f" shows the"
            " format."
        )
    return content


def _check_schema(content: Mapping[str, Any], path: Path) -> None:
    if content.get("schema", SCHEMA) != SCHEMA:
        raise FedkdError(
            f"Expected schema {SCHEMA} in {path}, but found {content['schema']!r}; it was written by"
            f" another version of"
            " fedkd, so read it with that version."
        )


def write_text(path: Path, text: str) -> Path:
    """Write a whole file or none of it: an interrupted write leaves the earlier file as it was."""
    make_folder(path.parent)
    write_atomic(path, text.encode())
    return path


# --- one run
# ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    """One answer that the server put aside, and why."""

    client: int
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Round:
    """One line of `rounds.jsonl`."""

    round: int
    asked: int
    answered: int
    abstained: int
    dropped: int
    late: int
    quarantined: tuple[Quarantine, ...]
    failed: str | None
    student_accuracy: float | None
    clients_accuracy: tuple[float | None, ...] | None  # None where the clients were not evaluated in this round
    ensemble_accuracy: float | None
    bytes_up: int  # of this round, all devices together
    bytes_down: int
    epsilon: float | None  # None is infinity
    seconds: float
    virtual_seconds: float | None  # the clock when the round was closed; None without virtual time
    staleness: float | None  # mean over the answers used
    in_flight: int
    loss: Mapping[str, float | None]
    raw: Mapping[str, Any] = field(repr=False, compare=False)  # later columns are found here

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Self:
        """Take one decoded line; a missing column counts as null or as zero."""
        accuracies = row.get("clients_accuracy")
        return cls(
            round=_count(row.get("round")),
            asked=_count(row.get("asked")),
            answered=_count(row.get("answered")),
            abstained=_count(row.get("abstained")),
            dropped=_count(row.get("dropped")),
            late=_count(row.get("late")),
            quarantined=tuple(
                Quarantine(
                    client=_count(item.get("client")),
                    reason=str(item.get("reason", "")),
                    message=str(item.get("message", "")),
                )
                for item in map(_table, _items(row.get("quarantined")))
            ),
            failed=None if row.get("failed") in (None, False, "") else str(row["failed"]),
            student_accuracy=_number(row.get("student_accuracy")),
            clients_accuracy=None if accuracies is None else tuple(_number(value) for value in _items(accuracies)),
            ensemble_accuracy=_number(row.get("ensemble_accuracy")),
            bytes_up=_count(row.get("bytes_up")),
            bytes_down=_count(row.get("bytes_down")),
            epsilon=_number(row.get("epsilon")),
            seconds=_number(row.get("seconds")) or 0.0,
            virtual_seconds=_number(row.get("virtual_seconds")),
            staleness=_number(row.get("staleness")),
            in_flight=_count(row.get("in_flight")),
            loss={key: _number(value) for key, value in _table(row.get("loss")).items()},
            raw=row,
        )

    @property
    def clients_mean(self) -> float | None:
        """Mean accuracy of the devices that were evaluated."""
        return mean(self.clients_accuracy or ())


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The numbers a run ends with, as fractions; None where a method has no such thing."""

    student: float | None = None
    clients_mean: float | None = None
    clients_own_classes_mean: float | None = None
    clients_own_classes_pooled: float | None = None
    local_only: float | None = None
    ensemble: float | None = None

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Self:
        """Take the decoded table; what is missing is None."""
        return cls(**{name: _number(content.get(name)) for name in ACCURACIES})


ACCURACIES: tuple[str, ...] = tuple(item.name for item in fields(Accuracy))


@dataclass(frozen=True, kw_only=True)
class Client:
    """One device at the end of a run."""

    client: int
    name: str
    architecture: str
    examples: int
    accuracy: float | None
    accuracy_own_classes: float | None
    local_only: float | None


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """The public inputs that all devices label; `bytes` is one copy of them."""

    name: str
    identity: str
    size: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Who holds how many examples of which class."""

    counts: tuple[tuple[int, ...], ...]  # counts[client][class]
    class_names: tuple[str, ...]
    client_names: tuple[str, ...]
    architectures: tuple[str, ...]
    proxy: Proxy | None

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Self:
        """Take the decoded file; names that are missing are numbered."""
        counts = tuple(tuple(_count(value) for value in _items(row)) for row in _items(content.get("counts")))
        clients = len(counts)
        classes = max((len(row) for row in counts), default=0)
        counts = tuple(row + (0,) * (classes - len(row)) for row in counts)
        proxy = _table(content.get("proxy"))
        return cls(
            counts=counts,
            class_names=_names(content.get("class_names"), classes, "class {}"),
            client_names=_names(content.get("client_names"), clients, "client {}"),
            architectures=_names(content.get("architectures"), clients, ""),
            proxy=Proxy(
                name=str(proxy.get("name", "")),
                identity=str(proxy.get("identity", "")),
                size=_count(proxy.get("size")),
                bytes=_count(proxy.get("bytes")),
            )
            if proxy
            else None,
        )


def _names(given: object, length: int, template: str) -> tuple[str, ...]:
    names = [str(name) for name in _items(given)][:length]
    return tuple(names + [template.format(index) for index in range(len(names), length)])


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, finished or not; where `summary.json` is missing, the rounds tell what it would say."""

    path: Path
    name: str
    method: str
    runner: str
    seed: int | None
    status: str  # "finished", "stopped", "failed", or "unfinished" where there is no summary yet
    rounds_planned: int | None
    rounds: tuple[Round, ...]
    accuracy: Accuracy
    clients: tuple[Client, ...]
    partition: Partition | None
    bytes_up: int
    bytes_down: int
    bytes_proxy: int
    bytes_up_per_device: float | None
    bytes_down_per_device: float | None  # with the proxy set
    epsilon: float | None
    delta: float | None
    unit: str | None  # whose presence epsilon hides: "record" or "client"; None without a mechanism
    relation: str | None  # of neighbouring data: "add_remove" or "replace_one"
    virtual_seconds: float | None  # None without virtual time
    seconds: float
    versions: Mapping[str, str]
    git_revision: str | None
    notes: tuple[str, ...]
    config: Mapping[str, Any]
    config_text: str
    summary: Mapping[str, Any] = field(repr=False, compare=False)  # as written; empty for an unfinished run
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of its point in a sweep, without the seed

    @classmethod
    def read(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read one run folder.

        Args:
            path: A folder with `rounds.jsonl`.
            overrides: What a sweep set for this run; the seed among them is left out.
        """
        path = Path(path)
        if not is_run(path):
            raise FedkdError(
                f"Expected a run folder (one with {ROUNDS_FILE}) at {path}, but {_what_is(path)}; give"
                f" the folder that"
                " `fedkd simulate` printed."
            )
        config_text, config = _read_config(path / CONFIG_FILE)
        rounds = read_rounds(path / ROUNDS_FILE)
        partition = None
        if (path / PARTITION_FILE).exists():
            partition = Partition.parse(read_json(path / PARTITION_FILE))
        summary: dict[str, Any] = {}
        if (path / SUMMARY_FILE).exists():
            summary = read_json(path / SUMMARY_FILE)
            _check_schema(summary, path / SUMMARY_FILE)

        clients = _clients(summary, partition, rounds)
        bytes_up = _count(summary.get("bytes_up", sum(row.bytes_up for row in rounds)))
        bytes_down = _count(summary.get("bytes_down", sum(row.bytes_down for row in rounds)))
        proxy = partition.proxy if partition else None
        bytes_proxy = _count(summary.get("bytes_proxy", proxy.bytes * len(clients) if proxy else 0))
        claim = _table(summary.get("privacy"))
        seed = _number(summary.get("seed", config.get("seed")))
        planned = _number(summary.get("rounds", config.get("rounds")))
        return cls(
            path=path,
            name=str(summary.get("name") or config.get("name") or path.resolve().name),
            method=str(summary.get("method") or _method(config)),
            runner=str(summary.get("runner") or _word(config.get("runner")) or "unknown"),
            seed=None if seed is None else int(seed),
            status=str(summary.get("status") or "unfinished"),
            rounds_planned=None if planned is None else int(planned),
            rounds=rounds,
            accuracy=Accuracy.parse(_table(summary["accuracy"])) if "accuracy" in summary else _last(rounds),
            clients=clients,
            partition=partition,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            bytes_proxy=bytes_proxy,
            bytes_up_per_device=_per_device(summary.get("bytes_up_per_device"), bytes_up, clients),
            bytes_down_per_device=_per_device(summary.get("bytes_down_per_device"), bytes_down + bytes_proxy, clients),
            epsilon=_number(summary["epsilon"] if "epsilon" in summary else rounds[-1].epsilon if rounds else None),
            delta=_number(summary.get("delta")),
            unit=_word(claim.get("unit")) or None,
            relation=_word(claim.get("relation")) or None,
            virtual_seconds=_number(summary.get("virtual_seconds"))
            or next((row.virtual_seconds for row in reversed(rounds) if row.virtual_seconds is not None), None),
            seconds=_number(summary.get("seconds")) or math.fsum(row.seconds for row in rounds),
            versions={key: str(value) for key, value in _table(summary.get("versions")).items()},
            git_revision=None if summary.get("git_revision") is None else str(summary["git_revision"]),
            notes=tuple(str(note) for note in _items(summary.get("notes"))),
            config=config,
            config_text=config_text,
            summary=summary,
            overrides={key: value for key, value in (overrides or {}).items() if key != "seed"},
        )

    @property
    def finished(self) -> bool:
        """Did the run reach its last round?"""
        return self.status == "finished"

    @property
    def devices(self) -> int:
        """How many devices took part, 0 where the folder does not say."""
        return len(self.clients)

    @cached_property
    def settings(self) -> str:
        """The settings that shape the result, as one comparable text (no seed, no checkpoints)."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_SCIENCE}
        return json.dumps(kept, sort_keys=True, default=str)


def is_run(path: Path) -> bool:
    """Is this the folder of one run?"""
    return (path / ROUNDS_FILE).is_file()


def is_sweep(path: Path) -> bool:
    """Is this the folder of several runs?"""
    return not is_run(path) and (path / SWEEP_FILE).is_file()


def _what_is(path: Path) -> str:
    if not path.exists():
        return "there is nothing there"
    if not path.is_dir():
        return "that is a file"
    if is_sweep(path):
        return "that is a sweep of several runs"
    return f"that folder has no {ROUNDS_FILE}"


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text as it stands and what it says; an old or missing file gives nothing rather than no report."""
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, _table(yaml.safe_load(text))
    except yaml.YAMLError:
        return text, {}


def read_rounds(path: Path) -> tuple[Round, ...]:
    """The rows of `rounds.jsonl`: a last line cut short is dropped, a broken line before it is an error."""
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    rows: dict[int, Round] = {}
    for place, (number, line) in enumerate(lines):
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError(f"a {type(content).__name__} and no object")
        except ValueError as problem:
            if place == len(lines) - 1:
                break
            raise FedkdError(
                f"Expected one JSON object per line in {path}, but line {number} cannot be read"
                f" ({problem}); remove that"
                " line, or resume the run from its last checkpoint."
            ) from None
        row = Round.parse(content)
        # A resumed run may repeat the round in which it was stopped: the later line is the one that counts.
        rows[row.round] = row
    return tuple(rows[key] for key in sorted(rows))


def _word(value: object) -> str:
    """A setting's name, given bare or as a table with its own settings."""
    if isinstance(value, Mapping):
        value = value.get("name", value.get("kind", value.get("method")))
    return "" if value is None else str(value)


def _method(config: Mapping[str, Any]) -> str:
    return _word(config.get("method")) or _word(config.get("algorithm")) or "unknown"


def _last(rounds: Sequence[Round]) -> Accuracy:
    """The last known accuracies of a run that has no summary."""

    def latest(get: Callable[[Round], float | None]) -> float | None:
        return next((value for row in reversed(rounds) if (value := get(row)) is not None), None)

    return Accuracy(
        student=latest(lambda row: row.student_accuracy),
        clients_mean=latest(lambda row: row.clients_mean),
        ensemble=latest(lambda row: row.ensemble_accuracy),
    )


def _clients(summary: Mapping[str, Any], partition: Partition | None, rounds: Sequence[Round]) -> tuple[Client, ...]:
    given = [_table(item) for item in _items(summary.get("per_client"))]
    if given:
        return tuple(
            Client(
                client=_count(item.get("client", index)),
                name=str(item.get("name", f"client {index}")),
                architecture=str(item.get("architecture", "")),
                examples=_count(item.get("examples")),
                accuracy=_number(item.get("accuracy")),
                accuracy_own_classes=_number(item.get("accuracy_own_classes")),
                local_only=_number(item.get("local_only")),
            )
            for index, item in enumerate(given)
        )
    latest = next((row.clients_accuracy for row in reversed(rounds) if row.clients_accuracy), ())
    count = max(len(latest), len(partition.counts) if partition else 0)
    return tuple(
        Client(
            client=index,
            name=partition.client_names[index] if partition and index < len(partition.counts) else f"client {index}",
            architecture=partition.architectures[index] if partition and index < len(partition.counts) else "",
            examples=sum(partition.counts[index]) if partition and index < len(partition.counts) else 0,
            accuracy=latest[index] if index < len(latest) else None,
            accuracy_own_classes=None,
            local_only=None,
        )
        for index in range(count)
    )


def _per_device(given: object, total: int, clients: Sequence[Client]) -> float | None:
    number = _number(given)
    if number is not None:
        return number
    return total / len(clients) if clients else None


# --- several runs
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep folder and the runs in it that exist so far."""

    path: Path
    name: str
    runs: tuple[Run, ...]
    missing: tuple[str, ...]  # folders of points that have not started

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a sweep folder and all its runs."""
        path = Path(path)
        if not is_sweep(path):
            what = "that is a single run" if is_run(path) else _what_is(path).replace(ROUNDS_FILE, SWEEP_FILE)
            raise FedkdError(f"Expected a sweep folder (one with {SWEEP_FILE}) at {path}, but {what}; give its folder.")
        content = read_json(path / SWEEP_FILE)
        runs: list[Run] = []
        missing: list[str] = []
        for folder, overrides in sweep_points(path):
            if is_run(path / folder):
                runs.append(Run.read(path / folder, overrides))
            else:
                missing.append(str(folder))
        return cls(
            path=path,
            name=str(content.get("name") or path.resolve().name),
            runs=tuple(runs),
            missing=tuple(missing),
        )


def sweep_points(path: Path) -> list[tuple[PurePosixPath, dict[str, Any]]]:
    """The points of the sweep in the folder `path`: the folder of each below it, and what it sets."""
    content = read_json(path / SWEEP_FILE)
    _check_schema(content, path / SWEEP_FILE)
    points = []
    for point in map(_table, _items(content.get("points"))):
        folder = PurePosixPath(str(point.get("folder", "")))
        # A sweep that somebody sent may be unpacked anywhere, so it may name nothing outside itself.
        if not folder.parts or folder.is_absolute() or ".." in folder.parts:
            raise FedkdError(
                f"Expected a folder below the sweep in {path / SWEEP_FILE}, but found {str(folder)!r}; write it"
                " relative to the sweep, without '..'."
            )
        points.append((folder, _table(point.get("overrides"))))
    return points


def expand(paths: Iterable[str | Path]) -> list[Run]:
    """All runs below the given run and sweep folders, in the order given, each once."""
    runs: list[Run] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        if is_run(path):
            found: Sequence[Run] = [Run.read(path)]
        elif is_sweep(path):
            found = Sweep.read(path).runs
        else:
            raise FedkdError(
                f"Expected a run folder (with {ROUNDS_FILE}) or a sweep folder (with {SWEEP_FILE}) at"
                f" {path}, but"
                f" {_what_is(path)}; give folders that `fedkd simulate` wrote."
            )
        for run in found:
            if (place := run.path.resolve()) not in seen:
                seen.add(place)
                runs.append(run)
    if not runs:
        raise FedkdError(
            "Expected at least one run with a round in it, but the given folders hold none yet; wait for"
            " the first"
            " round, or give other folders."
        )
    return runs


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One number over seeds. `std` divides by n - 1, so a single seed has none."""

    mean: float
    std: float | None
    n: int
    per_seed: tuple[float | None, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Self | None:
        """Summarise; None where no seed has the number."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        centre = math.fsum(known) / len(known)
        std = None
        if len(known) > 1:
            std = math.sqrt(math.fsum((value - centre) ** 2 for value in known) / (len(known) - 1))
        return cls(mean=centre, std=std, n=len(known), per_seed=tuple(values))

    def as_dict(self) -> dict[str, Any]:
        """The form it has in a summary."""
        return {"mean": self.mean, "std": self.std, "per_seed": list(self.per_seed)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in the seed alone. Numbers come from the finished ones, or from all if none is."""

    name: str
    method: str
    runner: str
    overrides: Mapping[str, Any]
    runs: tuple[Run, ...]

    @cached_property
    def counted(self) -> tuple[Run, ...]:
        """The runs that enter the numbers: one cut short would pull the mean down for no good reason."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def left_out(self) -> tuple[Run, ...]:
        """The runs that do not enter the numbers."""
        return tuple(run for run in self.runs if run not in self.counted)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds that enter the numbers."""
        return tuple(run.seed for run in self.counted)

    @property
    def label(self) -> str:
        """The method and what a sweep changed in it."""
        changed = ", ".join(f"{key.removeprefix('algorithm.')}={_short(value)}" for key, value in self.changed.items())
        return f"{self.method} ({changed})" if changed else self.method

    @property
    def changed(self) -> dict[str, Any]:
        """The overrides without those that only choose the method, which has a column of its own."""
        return {
            key: value
            for key, value in self.overrides.items()
            if not (key in {"method", "algorithm", "algorithm.name"} and _word(value) == self.method)
        }

    def accuracy(self, name: str) -> Spread | None:
        """One of the accuracies over the seeds."""
        return Spread.of([getattr(run.accuracy, name) for run in self.counted])

    def average(self, name: str) -> float | None:
        """The mean over seeds of a number that every run has, such as `bytes_up` or `seconds`."""
        return mean(_number(getattr(run, name)) for run in self.counted)

    @property
    def epsilon(self) -> float | None:
        """The largest over the seeds, for a claim holds only if it holds for the worst; None is infinity."""
        values = [run.epsilon for run in self.counted]
        return None if any(value is None for value in values) else max(value for value in values if value is not None)

    @property
    def unit(self) -> str | None:
        """Whose presence epsilon hides. The runs share one configuration, and with it the unit."""
        return next((run.unit for run in self.counted if run.unit is not None), None)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_seeds(runs: Iterable[Run]) -> list[Group]:
    """Put runs together that differ in the seed alone, in the order in which they first appear.

    Besides name, method and overrides, the whole configuration has to agree: two runs that were started by
    hand with different settings keep the same name. The same seed twice is a repetition and starts a group of
    its own.
    """
    groups: dict[tuple[str, ...], list[list[Run]]] = {}
    order: list[list[Run]] = []
    for run in runs:
        overrides = json.dumps(run.overrides, sort_keys=True, default=str)
        candidates = groups.setdefault((run.name, run.method, run.runner, overrides, run.settings), [])
        for members in candidates:
            if all(member.seed != run.seed for member in members):
                members.append(run)
                break
        else:
            candidates.append([run])
            order.append(candidates[-1])
    return [
        Group(
            name=members[0].name,
            method=members[0].method,
            runner=members[0].runner,
            overrides=members[0].overrides,
            runs=tuple(members),
        )
        for members in order
    ]


def summarise_sweep(sweep: Sweep | str | Path) -> dict[str, Any]:
    """The content of a sweep's `summary.json`: one entry per point, with its seeds put together."""
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.read(sweep)
    points = []
    for group in group_seeds(sweep.runs):
        accuracies = {name: group.accuracy(name) for name in ACCURACIES}
        points.append(
            {
                "overrides": dict(group.overrides),
                "method": group.method,
                "seeds": list(group.seeds),
                "folders": [run.path.relative_to(sweep.path).as_posix() for run in group.counted],
                "left_out": [
                    {"folder": run.path.relative_to(sweep.path).as_posix(), "status": run.status}
                    for run in group.left_out
                ],
                "statuses": [run.status for run in group.counted],
                "accuracy": {name: spread.as_dict() if spread else None for name, spread in accuracies.items()},
                "bytes_up": group.average("bytes_up"),
                "bytes_down": group.average("bytes_down"),
                "bytes_proxy": group.average("bytes_proxy"),
                "bytes_up_per_device": group.average("bytes_up_per_device"),
                "bytes_down_per_device": group.average("bytes_down_per_device"),
                "epsilon": group.epsilon,
                "epsilon_unit": group.unit,
                "seconds": group.average("seconds"),
                "virtual_seconds": group.average("virtual_seconds"),
            }
        )
    return {"schema": SCHEMA, "name": sweep.name, "points": points, "missing": list(sweep.missing)}


def write_sweep_summary(path: str | Path) -> Path:
    """Make (or renew) the `summary.json` of a sweep folder."""
    path = Path(path)
    text = json.dumps(summarise_sweep(path), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    return write_text(path / SUMMARY_FILE, text + "\n")
