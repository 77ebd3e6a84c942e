"""Flower messages taken apart into objects and put together again, with every object checked by its hash.

Flower sends a message's outline first, a tree of SHA-256 names, and then the objects one by one, in pieces of a few MiB.
So sizes are counted while they come, and a sender that claims much or sends something else is stopped early.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import fedkd.deploy.switches  # noqa: F401  # first: Flower reads its switches when it is imported
from fedkd.deploy.mail import MailError

from flwr.app import Message  # isort: skip
from flwr.common.serde import message_to_proto  # isort: skip
from flwr.app.message import remove_content_from_message  # isort: skip
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
    def begin(cls, message_id: str, tree: Any, most_bytes: int) -> Arriving:
        """Read the outline of a message.

        Raises:
            MailError: it lists more objects than any message of fedkd has.
        """
        names: dict[str, None] = {}
        for node in iterate_object_tree(tree):
            names[node.object_id] = None
            if len(names) > MAX_OBJECTS:
                raise MailError("form", f"a message of more than {MAX_OBJECTS} objects")
        return cls(message_id, list(names), most_bytes)

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


def take_apart(message: Message) -> tuple[Any, Any, dict[str, bytes]]:
    """Return a message's outline as Flower sends it: the message without content, the tree, and the objects by name."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
        bare = remove_content_from_message(message) if message.has_content() else message
        return message_to_proto(bare), tree, objects
