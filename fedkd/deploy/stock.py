"""What Flower's own SuperNode runs on a device: the same device, policy, store and outbox as the lean node."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import fedkd.deploy.switches  # noqa: F401  # first: Flower reads its switches when it is imported
from fedkd.deploy.device import Device
from fedkd.deploy.kit import ClientKit
from fedkd.deploy.mail import pack_say, unpack_ask

from flwr.app import Message  # isort: skip


@lru_cache(maxsize=1)
def _kit(folder: str) -> ClientKit:
    return ClientKit.read(Path(folder))


def answer(message: Message) -> Message:
    """Answer one message. ``FEDKD_KIT``, set where SuperExec is started, names this client's kit.

    Raises:
        MailError: the message is none of fedkd's; Flower reports the failure.
    """
    kit = _kit(os.environ["FEDKD_KIT"])
    say = Device(kit).handle(unpack_ask(message.content))
    return Message(pack_say(say, kit.node_key()), reply_to=message)
