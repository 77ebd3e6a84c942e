"""A CA, certificates and a trained teacher for the tests of the service."""

from __future__ import annotations

import copy
import datetime as dt
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sklearn.datasets import load_digits
from torch import Tensor

from fedkd.distill import Distiller, Fit, ModuleTeacher, Term
from fedkd.losses import CrossEntropy
from fedkd.models import Architecture


@dataclass(frozen=True)
class Authority:
    """A private CA in a folder: ``issue`` writes NAME.pem and NAME.key."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @staticmethod
    def make(folder: Path) -> Authority:
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        made = _builder(name, name, key).add_extension(x509.BasicConstraints(True, 0), True).sign(key, hashes.SHA256())
        (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        return Authority(folder, key, made)

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = (
            _builder(subject, self.certificate.subject, key)
            .add_extension(x509.SubjectAlternativeName(places), False)
            .add_extension(x509.ExtendedKeyUsage(usage), False)
            .sign(self.key, hashes.SHA256())
        )
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
    )


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    x = torch.from_numpy(np.asarray(bunch.images, np.float32) / 16)[:, None]
    return x, torch.from_numpy(np.asarray(bunch.target, np.int64))


@pytest.fixture(scope="session")
def taught(digits: tuple[Tensor, Tensor]) -> ModuleTeacher:
    x, y = digits
    architecture = Architecture("mlp", (1, 8, 8), 10, torch.float32)
    net = architecture.module(architecture.initial(1))
    Distiller(net, None, [Term(CrossEntropy(), 1.0)], fit=Fit(epochs=10)).fit(x[:1000], y[:1000])
    return ModuleTeacher(net, 10, (1, 8, 8))


@pytest.fixture
def new_ca() -> Callable[[Path], Authority]:
    """Return the function that makes a CA in a folder."""
    return Authority.make


@pytest.fixture(scope="session")
def members(taught: ModuleTeacher) -> Callable[[int], list[tuple[ModuleTeacher, float]]]:
    """Return what makes members of an ensemble: teachers that agree, and are not one model."""

    def make(count: int) -> list[tuple[ModuleTeacher, float]]:
        found = []
        for i in range(count):
            module = copy.deepcopy(taught.module)
            with torch.no_grad():
                next(module.parameters()).mul_(1 + 1e-4 * i)
            found.append((ModuleTeacher(module, taught.classes, taught.shape), 1.0))
        return found

    return make
