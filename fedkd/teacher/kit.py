"""A folder that lets a teacher be served at once: a private CA, a certificate, a policy, and a token per caller.

For mutual TLS each caller gets a certificate too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedkd.deploy.ca import CLIENT, SERVER, Authority, certificate_pem, key_pem, new_key
from fedkd.errors import ConfigError
from fedkd.experiment import build
from fedkd.storage import write_atomic
from fedkd.teacher.policy import Policy, new_token, token_hash

DAYS = 90


def make_kit(
    folder: Path, hosts: Sequence[str], callers: Sequence[str], listen: str, mutual: bool = False
) -> dict[str, Path]:
    """Make ``folder`` with policy.yaml, ca.crt, server.crt, server.key and tokens/NAME; return each caller's token file.

    ``mutual``: also certificates/NAME.crt and NAME.key, without which nobody may even ask for the service's health.

    The authority's key is not kept: it has signed all that it was made for.

    Raises:
        ConfigError: the folder is there already and holds something, or a caller's name is none.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose another folder, or serve with --policy {folder}/policy.yaml")
    tokens = {name: new_token() for name in callers}
    tls = {"certificate": "server.crt", "key": "server.key"} | ({"client_ca": "ca.crt"} if mutual else {})
    known = [
        {"name": name, "token_sha256": token_hash(tokens[name]), "queries": 100_000}
        | ({"certificate": name} if mutual else {})
        for name in callers
    ]
    raw = {"listen": listen, "tls": tls, "callers": known}
    # Before anything is written, so that a wrong name leaves no half of a kit.
    build(Policy, raw)
    authority, key = Authority.new("fedkd teacher"), new_key()
    leaf = authority.leaf("teacher", key.public_key(), usage=SERVER, hosts=list(dict.fromkeys(hosts)), days=DAYS)
    for part in ("tokens", "certificates") if mutual else ("tokens",):
        (folder / part).mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    write_atomic(folder / "ca.crt", certificate_pem(authority.certificate))
    write_atomic(folder / "server.crt", certificate_pem(leaf))
    _secret(folder / "server.key", key_pem(key))
    for name, token in tokens.items():
        _secret(folder / "tokens" / name, token.encode() + b"\n")
        if mutual:
            own = new_key()
            shown = authority.leaf(name, own.public_key(), usage=CLIENT, days=DAYS)
            write_atomic(folder / "certificates" / f"{name}.crt", certificate_pem(shown))
            _secret(folder / "certificates" / f"{name}.key", key_pem(own))
    write_atomic(folder / "policy.yaml", yaml.safe_dump(raw, sort_keys=False).encode())
    return {name: folder / "tokens" / name for name in tokens}


def _secret(path: Path, data: bytes) -> None:
    """Write a file that nobody else may read, from its first byte on."""
    before = os.umask(0o077)
    try:
        write_atomic(path, data)
    finally:
        os.umask(before)
