"""A project's private certificate authority: it signs leaf certificates for one server and its clients, no more.

Guarantee: a leaf cannot sign others (basicConstraints, path length 0), a client's certificate cannot serve and the
server's cannot pass for a client's (extendedKeyUsage), and no name is taken from what a peer sends.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
BACKDATED = timedelta(hours=1)
"""Certificates are valid from an hour ago, so that a device whose clock lags a little takes them at once."""
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Authority:
    """The signing key and its own certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls, project: str, *, now: datetime | None = None) -> Authority:
        """Make an authority that is valid for ten years."""
        now = now or datetime.now(UTC)
        key = new_key()
        name = _name(f"{project} authority", project)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, key: bytes, certificate: bytes) -> Authority:
        """Read an authority from PEM.

        Raises:
            ValueError: the bytes are no key and certificate, or do not belong together.
        """
        found = serialization.load_pem_private_key(key, None)
        cert = x509.load_pem_x509_certificate(certificate)
        if not isinstance(found, ec.EllipticCurvePrivateKey) or not key_matches(found, cert):
            raise ValueError("the key of the certificate authority does not belong to its certificate")
        return cls(found, cert)

    def leaf(
        self,
        common_name: str,
        public_key: ec.EllipticCurvePublicKey,
        *,
        usage: x509.ObjectIdentifier,
        hosts: Sequence[str] = (),
        days: float,
        now: datetime | None = None,
    ) -> x509.Certificate:
        """Sign a leaf certificate for ``common_name``; it never outlives the authority.

        Args:
            common_name: a client's name, or what the server is called.
            public_key: of whom it is made for.
            usage: CLIENT or SERVER.
            hosts: names and addresses that it stands for (SAN); a client's stands for its name alone.
            days: how long it is valid; negative for a test that wants an expired one.
        """
        now = now or datetime.now(UTC)
        start, end = now - BACKDATED, now + timedelta(days=days)
        if end <= start:
            start = end - timedelta(days=1)
        authority_end = self.certificate.not_valid_after_utc
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name, self._project))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(min(end, authority_end))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([_general(host) for host in hosts or (common_name,)]), critical=False
            )
        )
        return builder.sign(self.key, hashes.SHA256())

    def revocations(self, serials: Iterable[int], *, now: datetime | None = None) -> bytes:
        """Return the list of revoked certificates as PEM.

        It is valid as long as the authority: the file lies beside who reads it, so that a date of its own would only
        lock everybody out when nobody renews it.
        """
        now = now or datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - BACKDATED)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        )
        for serial in sorted(set(serials)):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    @property
    def _project(self) -> str:
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """Make a private key; P-256 unless told otherwise, which is what a small device signs fastest with."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def key_matches(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bool:
    """Tell whether the certificate was made for the key."""
    return _public(key.public_key()) == _public(certificate.public_key())


def _public(key: object) -> bytes:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PKCS#8 PEM, which OpenSSL and nginx read."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def node_key_pair() -> tuple[bytes, bytes]:
    """Make a node's key: (private, public) in OpenSSH form, P-384, which is what `flower-supernode` reads."""
    key = new_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public


def _name(common_name: str, project: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, project),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
