"""Flower messages taken apart into objects and put together again, with every object checked by its hash.

Flower sends a message's outline first, a tree of SHA-256 names, and then the objects one by one, in pieces of a few MiB.
So sizes are counted while they come, and a sender that claims much or sends something else is stopped early.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fedkd.deploy.switches  # noqa: F401  # first: Flower reads its switches when it is imported
from fedkd.deploy.mail import SECTION, MailError

from flwr.app import Message  # isort: skip
from flwr.common.serde import message_to_proto  # isort: skip
from flwr.app.message import remove_content_from_message  # isort: skip
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER  # isort: skip
from flwr.supercore.inflatable.inflatable_object import (  # isort: skip
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (  # isort: skip
    inflate_object_from_contents,
    validate_object_content,
)

MAX_OBJECTS = 10_000


@dataclass
class Arriving:
    """A message whose objects come one by one. ``left``: names of those still missing; ``most_bytes``: the cap."""

    message_id: str
    left: list[str]
    most_bytes: int
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def begin(cls, listed: Any, tree: Any, most_bytes: int) -> Arriving:
        """Read the outline of a message: how SuperLink lists it, and the tree of its objects' names.

        Raises:
            MailError: it lists more objects than any message of fedkd has.
        """
        names: dict[str, None] = {}
        for node in iterate_object_tree(tree):
            names[node.object_id] = None
            if len(names) > MAX_OBJECTS:
                raise MailError("form", f"a message of more than {MAX_OBJECTS} objects")
        arriving = cls(listed.metadata.message_id, list(names), most_bytes)
        for content in _foreseen(listed, tree):
            name = hashlib.sha256(content).hexdigest()
            if name in names:
                arriving.take(name, content)
        return arriving

    def take(self, name: str, content: bytes) -> None:
        """Accept one object.

        Raises:
            MailError: ``cap`` beyond the cap, ``form`` for content of another hash.
        """
        self.size += len(content)
        if self.size > self.most_bytes:
            raise MailError("cap", f"a message over the cap of {self.most_bytes} bytes")
        if hashlib.sha256(content).hexdigest() != name:
            raise MailError("form", "an object that is not what its name says")
        self.contents[name] = content
        self.left.remove(name)

    def finish(self) -> Message:
        """Put the message together.

        Raises:
            MailError: the objects make no message.
        """
        try:
            for content in self.contents.values():
                validate_object_content(content)
            found = inflate_object_from_contents(self.message_id, self.contents)
        except Exception as cause:  # whatever Flower's readers make of a stranger's bytes, it is the bytes' fault
            raise MailError("form", f"objects that make no message: {type(cause).__name__}") from cause
        if not isinstance(found, Message):
            raise MailError("form", f"a {type(found).__name__} where a message was due")
        return found


def _foreseen(listed: Any, tree: Any) -> Iterator[bytes]:
    """Guess what need not be asked for: a message's head, and the list of its records where it has but a short text.

    Each object costs a request of its own. A guess counts only if its hash is the name that was listed.
    """
    metadata = type(listed.metadata)()
    metadata.CopyFrom(listed.metadata)
    metadata.message_id = ""
    head = type(listed)(metadata=metadata).SerializeToString(deterministic=True)
    children = list(tree.children)
    yield _object("Message", [child.object_id for child in children], head)
    if len(children) == 1 and len(children[0].children) == 1:
        text = children[0].children[0].object_id
        yield _object("RecordDict", [text], json.dumps({SECTION: text}).encode())


def _object(kind: str, children: list[str], body: bytes) -> bytes:
    """Return an object as Flower writes it: kind, names of its parts, length, and the body."""
    head = HEAD_VALUE_DIVIDER.join([kind, ",".join(children), str(len(body))])
    return bytes(head.encode() + HEAD_BODY_DIVIDER + body)


def take_apart(message: Message) -> tuple[Any, Any, dict[str, bytes]]:
    """Return a message's outline as Flower sends it: the message without content, the tree, and the objects by name."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
        bare = remove_content_from_message(message) if message.has_content() else message
        return message_to_proto(bare), tree, objects
