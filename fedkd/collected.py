"""The answers of a round, in memory or, where they are many, in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace

from fedkd.algorithms.base import Answer
from fedkd.payloads import Nothing, outline, rebuild
from fedkd.rows import Form, RowFile

HELD_BYTES = 128 * 2**20
"""Answers of a round that are held in memory. Ten thousand devices' soft labels for 500 samples are 200 MB."""


class Collected:
    """The accepted answers of a round; walked in the order of client ids, as often as one likes.

    Beyond ``held_bytes`` an answer's tensors lie in a temporary file and are read again at each walk, so that an
    aggregator that walks once, as a mean does, needs memory for one answer at a time.
    """

    def __init__(self, answers: Iterable[Answer] = (), held_bytes: int = HELD_BYTES) -> None:
        self._answers: dict[int, Answer] = {}
        self._away: dict[int, tuple[str, int]] = {}
        self._files: dict[str, tuple[Form, RowFile, int]] = {}
        self._left = held_bytes
        for answer in answers:
            self.add(answer)

    def add(self, answer: Answer) -> None:
        """Take an answer.

        Raises:
            StorageError: it does not fit into memory's share, and the disk is full.
        """
        client, tensors = answer.card.id, answer.payload.tensors()
        self._left -= sum(t.nbytes for t in tensors.values())
        if self._left < 0:
            form = Form.of(tensors, outline(answer.payload))
            if form.text not in self._files:
                file = tempfile.TemporaryFile(prefix="fedkd-answers-")  # noqa: SIM115 - lives as long as the answers
                self._files[form.text] = (form, RowFile(file, form.bytes, "a temporary file of answers"), 0)
            form, rows, count = self._files[form.text]
            rows.write(count, form.pack([tensors]))
            self._files[form.text] = (form, rows, count + 1)
            self._away[client] = (form.text, count)
            answer = replace(answer, payload=Nothing())
        self._answers[client] = answer

    def __contains__(self, client: int) -> bool:
        return client in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Answer]:
        for client in sorted(self._answers):
            answer = self._answers[client]
            if client in self._away:
                name, place = self._away[client]
                form, rows, _ = self._files[name]
                answer = replace(answer, payload=rebuild(form.rest, form.unpack(rows.read(place))))
            yield answer
