"""Flower's switches: no telemetry, no update check, nothing installed at run time. Import this before Flower."""

from __future__ import annotations

import os
from collections.abc import Mapping

SWITCHES: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)
