"""The report: complete, safe, the same every time, and honest about what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedkd.errors import FedkdError
from fedkd.report import svg
from fedkd.report.html import quantile, write_report

WriteRun = Callable[..., Path]

VOID = {"meta", "br", "img", "link", "input", "hr"}


class _Balance(HTMLParser):
    """Checks that what is opened is closed, and collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check(path: Path) -> _Balance:
    """Parse a report, check what holds for every report, and return the parsed page."""
    text = path.read_text(encoding="utf-8")
    page = _Balance()
    page.feed(text)
    page.close()
    assert page.open == []
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in {"src", "href", "xlink:href"}]
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<pre.*?</pre>", "", text, flags=re.S))
    return page


def headings(page_path: Path) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page_path.read_text(encoding="utf-8"))


def test_a_full_run(write_run: WriteRun) -> None:
    folder = write_run(clients=20, rounds=12, troubles=True, epsilon=6.0)
    out = write_report(folder)
    assert out == folder / "report.html"
    page = check(out)
    assert headings(out) == [
        "In short",
        "Limits",
        "Accuracy per round",
        "Accuracy against bytes",
        "Bytes sent so far",
        "Each device at the end",
        "The student, class by class",
        "Who holds what",
        "Events",
        "Epsilon",
        "Loss",
        "Configuration",
        "Made with",
    ]
    words = " ".join(page.words)
    assert "fewer than 2 answers" in words
    assert "NaN in 3 of 500 rows" in words
    assert "nothing protects" not in words
    assert "6 per record" in words and "at delta = 1e-05, neighbours: add remove" in words
    assert "12.3 %" in words, "of the last class"
    assert out.stat().st_size < 200_000


def test_every_chart_has_a_text(write_run: WriteRun) -> None:
    text = write_report(write_run(troubles=True, epsilon=1.0)).read_text()
    pictures = re.findall(r'<svg role="img".*?</svg>', text, flags=re.S)
    assert len(pictures) >= 7
    for picture in pictures:
        assert re.search(r'aria-label="[^"]{20,}"', picture)
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", picture)


def test_infinite_epsilon_is_said_aloud(write_run: WriteRun) -> None:
    words = " ".join(check(write_report(write_run())).words)
    assert "Epsilon is infinity: nothing protects what leaves the devices" in words
    assert "Epsilon" not in headings(write_report(write_run()))


def test_same_folder_same_bytes(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(troubles=True)
    first = write_report(folder, tmp_path / "1.html").read_bytes()
    assert write_report(folder, tmp_path / "2.html").read_bytes() == first


def test_what_comes_from_files_is_escaped(write_run: WriteRun) -> None:
    evil = '<script>alert("x")</script>'
    folder = write_run(name=evil, method=evil, runner=evil, config={"note": evil}, troubles=True)
    partition = json.loads((folder / "partition.json").read_text())
    for key in ("class_names", "client_names", "architectures"):
        partition[key] = [evil] * len(partition[key])
    partition["proxy"].update(name=evil, identity=evil)
    (folder / "partition.json").write_text(json.dumps(partition))
    summary = json.loads((folder / "summary.json").read_text())
    for client in summary["per_client"]:
        client.update(name=evil, architecture=evil)
    summary.update(notes=[evil], git_revision=evil, versions={evil: evil})
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        row["loss"] = {evil: 1.0}
        row["failed"] = evil
        row["quarantined"] = [{"client": 0, "reason": evil, "message": evil}]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = write_report(folder)
    page = check(out)
    assert "<script" not in out.read_text().lower()
    assert evil in " ".join(page.words)


@pytest.mark.parametrize(
    "options",
    [
        {"evaluated": False},
        {"evaluated": False, "summary": False},
        {"summary": False},
        {"student": False, "proxy": False},
        {"clients": 1, "rounds": 1, "sent": False, "proxy": False},
        {"clients": 1, "classes": 1, "rounds": 2},
        {"rounds": 0, "summary": False},
        {"status": "failed"},
        {"clients": 60, "classes": 100, "rounds": 3, "every": 3},
    ],
)
def test_missing_things_leave_no_holes(write_run: WriteRun, options: dict[str, Any]) -> None:
    check(write_report(write_run(**options)))


def test_without_partition_and_config(write_run: WriteRun) -> None:
    folder = write_run(summary=False)
    (folder / "partition.json").unlink()
    (folder / "config.yaml").unlink()
    out = write_report(folder)
    check(out)
    assert "Who holds what" not in headings(out)


def test_a_thousand_devices_stay_small(write_run: WriteRun) -> None:
    out = write_report(write_run(clients=1000, rounds=30))
    page = check(out)
    assert out.stat().st_size < 500_000
    assert f"{svg.PARTITION_COLUMNS} devices are drawn" in " ".join(page.words)


def test_sweep(write_sweep: WriteRun) -> None:
    points = [
        {
            "overrides": {"algorithm": method, "seed": seed},
            "run": {"method": method, "config": {"algorithm": method}},
        }
        for method in ("ds_fl", "cfd")
        for seed in (1, 2, 3)
    ]
    points.append(
        {
            "overrides": {"algorithm": "local", "seed": 1},
            "run": {"method": "local", "student": False, "sent": False, "config": {"algorithm": "local"}},
        }
    )
    points.append({"overrides": {"algorithm": "local", "seed": 2}, "started": False})
    out = write_report(write_sweep(points))
    page = check(out)
    words = " ".join(page.words)
    assert "7 runs, 3 points" in words
    assert "local: nothing sent" in words
    assert "Not started: algorithm=local,seed=2." in words
    assert headings(out)[:5] == [
        "In short",
        "Limits",
        "Student, per round",
        "Devices (mean), per round",
        "Accuracy against bytes",
    ]


def test_where_it_goes(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run()
    assert write_report(folder, tmp_path) == tmp_path / "report.html"
    assert write_report(folder, tmp_path / "new" / "x.html").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FedkdError, match="cannot make the folder"):
        write_report(folder, tmp_path / "file" / "x.html")
    with pytest.raises(FedkdError, match="there is none of them"):
        write_report(tmp_path / "nowhere")


def test_a_sweep_without_runs(write_sweep: WriteRun) -> None:
    with pytest.raises(FedkdError, match="none has started"):
        write_report(write_sweep([{"overrides": {"seed": 1}, "started": False}]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.94), (3, 4001), (0, 1e-7), (-2, 2), (0, 7.3e9), (0.1, 0.3)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 8
    slack = 1e-9 * (high - low)
    assert low - slack <= found[0]
    assert found[-1] <= high + slack
    assert all(len(f"{tick:.4g}") <= 8 for tick in found)


def test_thin_keeps_both_ends() -> None:
    assert svg.thin(3, 5) == [0, 1, 2]
    kept = svg.thin(1000, 160)
    assert (kept[0], kept[-1], len(set(kept))) == (0, 999, 160)


def test_quantile_is_the_usual_one() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert quantile([3.0], 0.9) == 3.0
