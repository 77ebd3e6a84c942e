"""Structured logs: one JSON object per line. They hold names, sizes and reasons; never records, labels, keys or seeds."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from pathlib import Path

ROTATED_BYTES, ROTATED_FILES = 10 * 2**20, 5


class JsonLines(logging.Formatter):
    """Formats a record as JSON: ts, level, component, event, and the mapping given as ``extra={"data": ...}``."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": self.component,
            "event": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup_log(component: str, folder: Path | None) -> logging.Logger:
    """Return the logger of a component, which writes ``<folder>/<component>.jsonl``, rotated; None: to stderr.

    The file is made for its owner alone.
    """
    log = logging.getLogger(f"fedkd.deploy.{component}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    handler: logging.Handler
    if folder is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{component}.jsonl"
        path.touch(mode=0o600)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=ROTATED_BYTES, backupCount=ROTATED_FILES, encoding="utf-8"
        )
    handler.setFormatter(JsonLines(component))
    log.addHandler(handler)
    return log


def event(log: logging.Logger, name: str, *, level: int = logging.INFO, **data: object) -> None:
    """Write one event with its data."""
    log.log(level, name, extra={"data": data})
