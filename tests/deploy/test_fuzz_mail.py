"""Whole messages under fuzzing, in short; ``python -m simulations.benchmarks.fuzz_mail`` is the long form."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedkd.deploy.mail import MailError, Say, pack_say, unpack_say
from fedkd.deploy.parcels import Arriving, take_apart
from simulations.benchmarks import fuzz_mail


def test_nothing_gets_through_and_nothing_crashes() -> None:
    counts = Counter(fuzz_mail.check(seed) for seed in range(300))
    assert {"taken", "refused: form", "refused: identity"} <= counts.keys()
    assert counts["taken"] < 100


def test_the_fuzzer_finds_a_reader_that_does_not_look_at_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trusting:
        def __init__(self, key: Any) -> None:
            self.key = key

        def verify(self, *_: Any) -> None:
            return None

    honest = fuzz_mail.unpack_say
    monkeypatch.setattr(fuzz_mail, "unpack_say", lambda record, key: honest(record, Trusting(key)))
    with pytest.raises(fuzz_mail.Escaped, match="did not give"):
        for seed in range(600):
            fuzz_mail.check(seed)


def say(**words: str) -> Say:
    return Say(kind="refused", run="r", client=0, round=0, key="k", **words)


def test_words_of_a_device_cannot_steer_a_terminal_or_become_a_metrics_label(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ec.generate_private_key(ec.SECP256R1())
    told = unpack_say(
        pack_say(say(reason="policy", message="two\nlines \x1b[2J and a \ud800 half"), node), node.public_key()
    )
    assert told.message == "two lines [2J and a half"
    dumps = json.dumps
    for changed in ({"message": "\x1b[2J"}, {"message": "a\nb"}, {"reason": 'x"} 1\nup 0'}, {"reason": "A" * 400}):
        with monkeypatch.context() as attacker:
            attacker.setattr("fedkd.deploy.mail.json.dumps", lambda words, changed=changed: dumps({**words, **changed}))
            record = pack_say(say(reason="policy", message="no"), node)
        with pytest.raises(MailError, match="unknown form"):
            unpack_say(record, node.public_key())


def test_what_follows_from_the_listing_is_not_asked_for() -> None:
    """Of a short message one object is left; the others are made here, and are what the sender's are."""
    for letter in fuzz_mail.letters():
        listed, tree, objects = take_apart(fuzz_mail.message(letter.record()))
        arriving = Arriving.begin(listed, tree, 2**20)
        assert arriving.contents.items() <= objects.items() and arriving.contents
        assert len(arriving.left) == (1 if len(objects) == 3 else len(objects) - 1)
        for name in list(arriving.left):
            arriving.take(name, objects[name])
        assert letter.read(arriving.finish().content) == letter.said


def test_a_listing_that_lies_is_not_believed() -> None:
    """Whatever a listing says beside the names: what is not of that name is asked for."""
    listed, tree, objects = take_apart(fuzz_mail.message(fuzz_mail.letters()[0].record()))
    listed.metadata.src_node_id += 1
    assert tree.object_id in Arriving.begin(listed, tree, 2**20).left
    assert len(Arriving.begin(listed, tree, 2**20).left) == len(objects) - 1
