"""The ledger holds what was charged, through crashes and against tampering; and never says less than was spent."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedkd.privacy.events import Event, epsilon
from fedkd.privacy.ledger import Entry, Ledger, LedgerError

ONE = Event(sigma=2.0, q=0.1, count=10)


def entry(device: int = 0, round: int = 0, **more: object) -> Entry:
    given = {
        "run": "a", "round": round, "what": "labels", "mechanism": "dp_sgd", "unit": "record",
        "relation": "add_remove", "event": ONE, "devices": (device,),
    }  # fmt: skip
    return Entry(**{**given, **more})  # type: ignore[arg-type]


def filled(path: Path, rounds: int = 3) -> Ledger:
    ledger = Ledger(path)
    for round in range(rounds):
        ledger.charge([entry(0, round), entry(1, round)])
    return ledger


def test_what_is_charged_is_on_disk_and_composes(tmp_path: Path) -> None:
    path = tmp_path / "x" / "ledger.jsonl"
    ledger = filled(path)
    again = Ledger(path)
    assert again.entries == ledger.entries and again.head == ledger.head
    assert again.epsilon(1e-5, 0) == epsilon([ONE.times(3)], 1e-5)
    row = json.loads(path.read_text().splitlines()[0])
    assert {"v", "n", "time", "run", "round", "what", "mechanism", "unit", "relation", "event", "sum"} <= row.keys()
    assert row["unit"] == "record" and row["relation"] == "add_remove"


def test_the_largest_device_counts_where_records_are_disjoint_and_all_where_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.charge([entry(0), entry(1), entry(1, 1)])
    assert ledger.spent(1e-5)[0].epsilon == epsilon([ONE.times(2)], 1e-5)
    assert ledger.spent(1e-5, disjoint=False)[0].epsilon == epsilon([ONE.times(3)], 1e-5)


def test_units_and_relations_are_not_mixed_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.charge([entry(0), entry(-1, unit="client", event=Event(sigma=3.0))])
    ledger.charge([entry(0, relation="replace_one")])
    client, record = ledger.spent(1e-5)
    assert (client.unit, client.epsilon) == ("client", epsilon([Event(sigma=3.0)], 1e-5))
    assert record.relation == "replace_one", "the stronger relation is claimed for all of a device's releases"
    assert record.epsilon == epsilon([ONE.times(2)], 1e-5, "replace_one")


def test_a_seeded_release_voids_the_claim(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "l")
    assert not ledger.spent(1e-5)[0].void
    ledger.charge([entry(0, 9, seeded=True)])
    assert Ledger(tmp_path / "l").spent(1e-5)[0].void


def test_would_exceed_looks_at_the_run_or_at_the_whole_life(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "l")
    now = ledger.epsilon(1e-5, 0)
    after = epsilon([ONE.times(4)], 1e-5)
    assert ledger.would_exceed(0, [ONE], after + 0.01, 1e-5) is None
    assert "over" in str(ledger.would_exceed(0, [ONE], (now + after) / 2, 1e-5))
    assert ledger.would_exceed(0, [ONE], (now + after) / 2, 1e-5, run="another") is None
    assert ledger.would_exceed(0, [Event(sigma=0.0)], 1e6, 1e-5) is not None
    assert ledger.would_exceed(0, [ONE], None, 1e-5) is None


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_set_aside_and_the_rest_stands(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "l"
    ledger = filled(path)
    before = ledger.epsilon(1e-5, 0)
    with open(path, "ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:cut])
    again = Ledger(path)
    assert again.epsilon(1e-5, 0) == before
    again.charge([entry(0, 3)])
    assert Ledger(path).epsilon(1e-5, 0) > before
    assert any(json.loads(line)["kind"] == "torn" for line in path.read_text().splitlines())


def _line(path: Path, number: int, change: object) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[number] = change(lines[number])  # type: ignore[operator]
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: _line(p, 2, lambda x: x.replace('"sigma":2.0', '"sigma":9.0')),
        lambda p: _line(p, 5, lambda x: x.replace('"count":10', '"count":1')),
        lambda p: _line(p, 0, lambda x: ""),
        lambda p: _line(p, 3, lambda x: ""),
        lambda p: _line(p, 5, lambda x: ""),
        lambda p: _line(p, 1, lambda x: "not json\n"),
        lambda p: _line(p, 1, lambda x: x.replace('"round":0', '"round":0,"extra":1')),
        lambda p: p.write_text("".join(reversed(p.read_text().splitlines(keepends=True)))),
        lambda p: p.write_text(""),
        lambda p: p.unlink(),
        lambda p: p.with_name(p.name + ".head").write_text("{}"),
    ],
    ids=[
        "sigma",
        "count",
        "first gone",
        "middle gone",
        "last gone",
        "no json",
        "key",
        "order",
        "emptied",
        "deleted",
        "head",
    ],
)
def test_tampering_is_found_and_stops_every_release(tmp_path: Path, harm: object) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path)
    harm(path)  # type: ignore[operator]
    with pytest.raises(LedgerError):
        Ledger(path).charge([entry(0, 9)])


@pytest.mark.parametrize("kept", [1, 2, 6])
def test_lines_are_not_read_without_their_number(tmp_path: Path, kept: int) -> None:
    """Lines and their number may be taken away together."""
    path = tmp_path / "l"
    filled(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    path.with_name("l.head").unlink()
    with pytest.raises(LedgerError, match="head is gone"):
        Ledger(path)


def test_a_crash_before_the_first_line_leaves_a_ledger_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.touch()
    ledger = Ledger(path)
    ledger.charge([entry()])
    assert Ledger(path).entries == ledger.entries != ()


def test_a_number_is_kept_before_the_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right after its first line was synced, a ledger still reads, and counts it."""
    path = tmp_path / "l"
    real = Ledger._write_head

    def dies(self: Ledger) -> None:
        if self._lines:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Ledger, "_write_head", dies)
    with pytest.raises(KeyboardInterrupt):
        Ledger(path).charge([entry(0), entry(1)])
    assert len(Ledger(path).entries) == 2


def test_a_life_is_charged_first_and_with_every_run(tmp_path: Path) -> None:
    life = tmp_path / "life"
    for name in ("a", "b"):
        ledger = Ledger(tmp_path / name, Ledger(life))
        ledger.charge([entry(run=name), entry(run=name, round=1)])
        assert ledger.epsilon(1e-5, 0) == epsilon([ONE.times(2)], 1e-5)
    assert Ledger(life).epsilon(1e-5, 0) == epsilon([ONE.times(4)], 1e-5)
    # The disk of the run is full: what was paid for and not released stays in the life's account.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "l").mkdir()
    broken = Ledger(tmp_path / "d", Ledger(life))
    broken.path = tmp_path / "c" / "l"
    with pytest.raises(LedgerError):
        broken.charge([entry(run="c")])
    assert Ledger(life).epsilon(1e-5, 0) == epsilon([ONE.times(5)], 1e-5)


def test_a_ledger_set_back_under_a_running_process_is_found(tmp_path: Path) -> None:
    path = tmp_path / "l"
    ledger = filled(path, 1)
    old, head = path.read_bytes(), path.with_name("l.head").read_bytes()
    ledger.charge([entry(0, 1)])
    path.write_bytes(old)
    path.with_name("l.head").write_bytes(head)
    with pytest.raises(LedgerError, match="shorter"):
        ledger.charge([entry(0, 2)])


def _charge(path: str, device: int) -> None:
    ledger = Ledger(Path(path))
    for round in range(10):
        ledger.charge([entry(device, round)])


def test_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "l"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_charge, args=(str(path), k)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    ledger = Ledger(path)
    assert len(ledger.entries) == 30
    assert [ledger.events(k) for k in range(3)] == [(ONE.times(10),)] * 3


def test_ten_thousand_devices_alike_take_one_short_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.charge([entry(devices=tuple(range(10_000)))])
    assert (tmp_path / "l").stat().st_size < 600
    assert Ledger(tmp_path / "l").events(9_999) == (ONE,)


@pytest.mark.fault(17, "a charge that does not fit on the disk is refused, nothing is released, the ledger stays whole")
def test_a_full_disk_refuses_and_leaves_the_ledger_whole(tmp_path: Path) -> None:
    path = tmp_path / "l"
    filled(path)
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = Ledger(path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
        with pytest.raises(LedgerError, match="nothing is released"):
            ledger.charge([entry(0, 9)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size
    Ledger(path).charge([entry(0, 9)])


@pytest.mark.fault(16, "killed right after a charge: it stands in the ledger")
def test_a_charge_is_on_disk_before_the_process_goes_on(tmp_path: Path) -> None:
    """Killed right after the charge, before anything is released: the charge stands."""
    path = tmp_path / "l"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2]); from test_ledger import entry\n"
        "from fedkd.privacy.ledger import Ledger\n"
        "Ledger(Path(sys.argv[1])).charge([entry()]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(Path(__file__).parent)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert Ledger(path).epsilon(1e-5, 0) > 0
    assert os.stat(path).st_mode & 0o077 == 0, "a node's ledger is nobody else's to read"
