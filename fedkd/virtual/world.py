"""The simulated devices: how fast they are, and when they are there. Everything follows from the experiment's seed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedkd.seeding import numpy_rng
from fedkd.virtual.config import VirtualConfig
from fedkd.virtual.trace import PROFILE, read_trace

NEVER = math.inf


class Presence(ABC):
    """When one device is there. Asked with times that never go back."""

    @abstractmethod
    def window(self, now: float) -> tuple[float, float]:
        """Return the first window [start, end) that ends after ``now``, or (inf, inf)."""


@final
class Cycle(Presence):
    """On for ``on`` seconds, then off for ``off``, for ever; at second 0 it is ``phase`` seconds into its turn."""

    def __init__(self, on: float, off: float, phase: float) -> None:
        self._on, self._turn, self._phase = on, on + off, phase

    def window(self, now: float) -> tuple[float, float]:
        turn = math.floor((now + self._phase) / self._turn)
        while True:
            start = turn * self._turn - self._phase
            if start + self._on > now:
                return start, start + self._on
            turn += 1


@final
class Spells(Presence):
    """Exponential spells on and off, with these means; drawn one after the other from the device's own stream."""

    def __init__(self, on: float, off: float, rng: np.random.Generator) -> None:
        self._on, self._off, self._rng = on, off, rng
        there = rng.random() < on / (on + off)
        self._start = 0.0 if there else rng.exponential(off)
        self._end = self._start + rng.exponential(on)

    def window(self, now: float) -> tuple[float, float]:
        while self._end <= now:
            self._start = self._end + self._rng.exponential(self._off)
            self._end = self._start + self._rng.exponential(self._on)
        return self._start, self._end


@final
class Windows(Presence):
    """The windows of a trace, sorted; with ``repeat`` they come again and again, the first right after the last."""

    def __init__(self, windows: Sequence[tuple[float, float]], repeat: float | None) -> None:
        self._windows, self._repeat = list(windows), repeat
        (first, until), (start, last) = windows[0], windows[-1]
        if repeat is not None and first == 0 and last == repeat:
            # Nobody leaves at midnight: the last window runs on into the first one of the next turn.
            self._windows = [(start - repeat, until), *windows[1:-1], (start, last + until)]

    def window(self, now: float) -> tuple[float, float]:
        turn = 0 if self._repeat is None else math.floor(now / self._repeat)
        for shift in (turn, turn + 1):
            offset = shift * (self._repeat or 0.0)
            for start, end in self._windows:
                if end + offset > now:
                    return start + offset, end + offset
            if self._repeat is None:
                break
        return NEVER, NEVER


class World:
    """All devices [K] of a simulation.

    Attributes:
        flops, down, up, latency: operations and bytes per second, and seconds, of every device [K].
    """

    def __init__(self, config: VirtualConfig, seed: int, count: int) -> None:
        """Draw or read the devices.

        Raises:
            ConfigError: the trace cannot be read.
        """
        self._presence: list[Presence | None] = [None] * count
        if config.trace is not None:
            traced = read_trace(config.trace, config.repeat_seconds)
            # Device k is line k of the trace, modulo their number: the same device in every experiment.
            mine = [traced[k % len(traced)] for k in range(count)]
            columns = [np.array([t.profile[name] for t in mine]) for name in PROFILE]
            always = ((), ((0.0, config.repeat_seconds),))
            self._presence = [None if t.windows in always else Windows(t.windows, config.repeat_seconds) for t in mine]
        else:
            columns = [getattr(config, name).of(numpy_rng(seed, "virtual", name), count) for name in PROFILE]
            if config.on_seconds is not None:
                self._presence = _cycles(config, seed, count)
        self.flops, self.down, self.up, self.latency = columns
        self._from = np.full(count, -NEVER)
        self._until = np.full(count, NEVER)
        for k, presence in enumerate(self._presence):
            if presence is not None:
                self._from[k], self._until[k] = presence.window(0.0)

    def there(self, now: float) -> NDArray[np.bool_]:
        """Return who is there [K] at ``now``, which never goes back from call to call."""
        for k in np.flatnonzero(self._until <= now):
            presence = self._presence[k]
            if presence is not None:
                self._from[k], self._until[k] = presence.window(now)
        found: NDArray[np.bool_] = self._from <= now
        return found

    def comes(self, now: float, who: NDArray[np.bool_]) -> float:
        """Return when the next of ``who`` [K] comes, as :meth:`there` last saw them at ``now``; infinity for nobody."""
        return float(np.min(self._from[who & (self._from > now)], initial=NEVER))

    def leaves(self, client: int) -> float:
        """Return when a device that is there leaves."""
        return float(self._until[client])


def _cycles(config: VirtualConfig, seed: int, count: int) -> list[Presence | None]:
    assert config.on_seconds is not None
    on = config.on_seconds.of(numpy_rng(seed, "virtual", "on_seconds"), count)
    off = config.off_seconds.of(numpy_rng(seed, "virtual", "off_seconds"), count)
    phase = numpy_rng(seed, "virtual", "phase").random(count)
    found: list[Presence | None] = []
    for k in range(count):
        if off[k] <= 0:
            found.append(None)
        elif config.cycle == "fixed":
            found.append(Cycle(on[k], off[k], phase[k] * (on[k] + off[k])))
        else:
            found.append(Spells(on[k], off[k], numpy_rng(seed, "virtual", "spells", k)))
    return found
