"""Bytes and seconds of a secure sum: ``python -m simulations.benchmarks.secure_sum``.

50 devices with soft labels for 2,000 proxy samples of 10 classes at 4,096 steps per unit; none, or 10 of them, drop out
after the shares were dealt. All parties run in one process, one after the other: seconds per device are its own work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.privacy.secure.heads import session_id
from fedkd.privacy.secure.protocol import Collector, Session, Terms, residues
from fedkd.privacy.secure.quantise import bits_for
from simulations.tables import HERE, made_with


def measure(devices: int, samples: int, classes: int, lost: int) -> dict[str, Any]:
    """Run one session and return bytes and seconds; raises AssertionError unless the sum is exact."""
    length, largest = samples * classes, 4096
    terms = Terms(length=length, bits=bits_for(devices, largest, 0))
    rng = np.random.default_rng(0)
    vectors = {k: rng.integers(-largest, largest + 1, length) for k in range(devices)}
    id = session_id("benchmark", 0)
    server, party = Collector(terms, id), {k: Session.open(id, k) for k in range(devices)}
    up = down = 0
    work = [0.0, 0.0]  # devices, server

    def timed(who: int, act: Any, *given: Any) -> Any:
        started = time.process_time()
        found = act(*given)
        work[who] += time.process_time() - started
        return found

    def step(clients: Any, body_of: Any, act: Any, take: Any) -> None:
        nonlocal up, down
        for k in clients:
            body = timed(1, body_of, k)
            reply = timed(0, act, k, body)
            up, down = up + len(reply), down + len(body)
            timed(1, take, k, reply)

    opening, everybody = server.opening(), range(devices)
    step(everybody, lambda k: opening, lambda k, b: party[k].keys(), server.take_keys)
    roster = server.roster_message()
    step(everybody, lambda k: roster, lambda k, b: party[k].deal(b, terms), server.take_shares)
    step(everybody, server.relay_message, lambda k, b: party[k].relay(b, terms), server.take_ready)
    stay = range(lost, devices)
    step(stay, lambda k: b"", lambda k, b: party[k].masked(residues(vectors[k], terms.bits), terms), server.take_masked)
    names, replies = server.survivors_message(), {}
    step(stay, lambda k: names, lambda k, b: party[k].unmask(b, terms), replies.__setitem__)
    total = timed(1, server.total, replies)
    assert np.array_equal(total, np.sum([vectors[k] for k in stay], axis=0))
    return {
        "devices": devices,
        "lost": lost,
        "bits": terms.bits,
        "bytes_up_per_device": up / devices,
        "bytes_down_per_device": down / devices,
        "bytes_float32": 4 * length,
        "seconds_per_device": work[0] / devices,
        "seconds_server": work[1],
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "secure_sum.json")
    words = parser.parse_args(argv)
    rows = [measure(words.devices, words.samples, 10, lost) for lost in (0, words.devices // 5)]
    for row in rows:
        print(
            f"{row['devices']} devices, {row['lost']} lost: {row['bytes_up_per_device'] / 1e3:.1f} kB up and "
            f"{row['bytes_down_per_device'] / 1e3:.1f} kB down per device ({row['bytes_float32'] / 1e3:.0f} kB of plain "
            f"float32); {row['seconds_per_device']:.3f} s per device, {row['seconds_server']:.2f} s on the server"
        )
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps({"versions": made_with(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
