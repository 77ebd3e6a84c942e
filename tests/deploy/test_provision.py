"""Kits: who holds what, what certificates allow, and what renewing, adding and revoking change."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.deploy import ca
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.provision import Kits, Newcomer, add_client, provision, renew, revoke
from fedkd.errors import ConfigError
from fedkd.storage import StorageError

PROJECT = """
project: trial
server: {host: fl.example.org, extra_hosts: [10.0.0.7]}
data: {source: mnist, part: "{id}", of: "{clients}", name: "site {name}"}
clients: [hospital-a, {name: hospital-b, policy: {rounds: 5}}, hospital-c]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of three clients, as `fedkd provision` makes it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "project.yaml").write_text(PROJECT)
    provision(folder / "project.yaml", folder / "kits")
    return folder


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "kits"


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def serials(kits: Path) -> set[int]:
    revoked = x509.load_pem_x509_crl((kits / "server" / "crl.pem").read_bytes())
    assert revoked.is_signature_valid(certificate(kits / "ca" / "ca.crt").public_key())
    return {entry.serial_number for entry in revoked}


def test_every_secret_is_for_its_owner_alone(kits: Path) -> None:
    for path in kits.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir() or path.suffix in (".key", ".secret"):
            assert mode & 0o077 == 0, f"{path} has mode {mode:o}"
    # systemd starts no unit whose ReadWritePaths are not there.
    assert all((kits / name / "state").is_dir() for name in ("server", "hospital-a", "hospital-b"))
    keys = [p.read_bytes() for p in kits.rglob("*.key")]
    assert len(keys) == len(set(keys)) == 1 + 2 + 3 * 2


def test_a_client_gets_nothing_of_others(kits: Path) -> None:
    secrets = {p: p.read_bytes() for p in kits.rglob("*") if p.suffix in (".key", ".secret")}
    for folder in kits.iterdir():
        if folder.is_dir():
            held = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
            assert all(data not in held for path, data in secrets.items() if path.parent != folder)
    assert not (kits / "server" / "ca.key").exists()


def test_kits_say_who_and_where(kits: Path) -> None:
    server, client = ServerKit.read(kits / "server"), ClientKit.read(kits / "hospital-b")
    assert (server.host, server.port, server.control_address) == ("fl.example.org", 8443, "127.0.0.1:8000")
    assert (client.name, client.id, client.server_address) == ("hospital-b", 1, "fl.example.org:8443")
    assert (client.folder / "data.yaml").read_text() == "source: mnist\npart: 1\nof: 3\nname: site hospital-b\n"
    assert (client.folder / "policy.yaml").read_text() == "rounds: 5\n"
    listed = server.client_list().clients
    assert [(c.name, c.id) for c in listed] == [("hospital-a", 0), ("hospital-b", 1), ("hospital-c", 2)]
    key = bytes_to_public_key(listed[1].node_key_pem)
    assert uses_nist_ec_curve(key) and key == client.node_key().public_key()
    assert isinstance(client.node_key(), ec.EllipticCurvePrivateKey)
    assert stat.S_IMODE(server.state.stat().st_mode) == 0o700


def test_a_kit_may_be_moved(kits: Path, tmp_path: Path) -> None:
    os.rename(kits / "hospital-a", tmp_path / "elsewhere")
    assert ClientKit.read(tmp_path / "elsewhere").tls().verify_mode == ssl.CERT_REQUIRED


def test_certificates_allow_one_use_each(kits: Path) -> None:
    root = certificate(kits / "ca" / "ca.crt")
    store = Store([root])
    server = certificate(kits / "server" / "server.crt")
    client = certificate(kits / "hospital-a" / "client.crt")
    verify_server = PolicyBuilder().store(store).build_server_verifier(x509.DNSName("fl.example.org"))
    verify_client = PolicyBuilder().store(store).build_client_verifier()
    verify_server.verify(server, [])
    verify_client.verify(client, [])
    with pytest.raises(VerificationError):
        verify_server.verify(client, [])
    with pytest.raises(VerificationError):
        verify_client.verify(server, [])
    with pytest.raises(VerificationError):
        PolicyBuilder().store(store).build_server_verifier(x509.DNSName("localhost")).verify(server, [])
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value[0] == ExtendedKeyUsageOID.CLIENT_AUTH
    assert not client.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert client.not_valid_after_utc - datetime.now(UTC) < timedelta(days=91)


def test_a_client_cannot_sign_others(kits: Path) -> None:
    """A client that signs a certificate with its own key is not believed."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    mine = certificate(kits / "hospital-a" / "client.crt")
    key = load_pem_private_key((kits / "hospital-a" / "client.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forged = ca.Authority(key, mine).leaf("hospital-b", ca.new_key().public_key(), usage=ca.CLIENT, days=1)
    store = Store([certificate(kits / "ca" / "ca.crt")])
    with pytest.raises(VerificationError):
        PolicyBuilder().store(store).build_client_verifier().verify(forged, [mine])


def test_renewal_keeps_keys_and_node_keys(kits: Path) -> None:
    folder = kits / "hospital-a"
    before = {name: (folder / name).read_bytes() for name in ("client.crt", "client.key", "node.key")}
    changed = renew(kits, ["hospital-a"], days=10)
    assert changed == [folder / "client.crt"]
    after = {name: (folder / name).read_bytes() for name in before}
    assert after["client.key"] == before["client.key"] and after["node.key"] == before["node.key"]
    assert after["client.crt"] != before["client.crt"]
    ends = certificate(folder / "client.crt").not_valid_after_utc
    assert timedelta(days=9) < ends - datetime.now(UTC) < timedelta(days=10)
    assert serials(kits) == set()
    ClientKit.read(folder).tls()


def test_new_keys_revoke_the_old_certificate(kits: Path) -> None:
    old = certificate(kits / "hospital-a" / "client.crt").serial_number
    key = (kits / "hospital-a" / "client.key").read_bytes()
    renew(kits, ["hospital-a"], new_keys=True)
    assert serials(kits) == {old}
    assert (kits / "hospital-a" / "client.key").read_bytes() != key
    ClientKit.read(kits / "hospital-a").tls()


def test_renewing_all_leaves_out_the_revoked(kits: Path) -> None:
    revoke(kits, "hospital-b")
    changed = {p.parent.name for p in renew(kits, [])}
    assert changed == {"server", "hospital-a", "hospital-c"}
    with pytest.raises(ConfigError, match="revoked"):
        renew(kits, ["hospital-b"])


def test_revoking_covers_every_certificate_of_that_name(kits: Path) -> None:
    first = certificate(kits / "hospital-b" / "client.crt").serial_number
    renew(kits, ["hospital-b"])
    second = certificate(kits / "hospital-b" / "client.crt").serial_number
    revoke(kits, "hospital-b")
    assert serials(kits) == {first, second}
    assert [c.revoked for c in ServerKit.read(kits / "server").client_list().clients] == [False, True, False]
    assert "CN=hospital-b" not in (kits / "server" / "nginx.conf").read_text()
    assert "CN=hospital-a" in (kits / "server" / "nginx.conf").read_text()


def test_ids_and_names_are_never_used_twice(kits: Path) -> None:
    revoke(kits, "hospital-c")
    folder = add_client(kits, Newcomer(name="hospital-d"))
    assert ClientKit.read(folder).id == 3
    assert (folder / "data.yaml").read_text().startswith("source: mnist\npart: 3\n")
    with pytest.raises(ConfigError, match="never used twice"):
        add_client(kits, Newcomer(name="hospital-c"))
    with pytest.raises(ConfigError, match="no client 'hospital-x'; did you mean"):
        revoke(kits, "hospital-x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PROJECT.replace("hospital-a", "server"), "cannot be called 'server'"),
        (PROJECT.replace("hospital-a", "../x"), "clients.0.name"),
        (PROJECT.replace("hospital-a", "hospital-b"), "two clients are called"),
        (PROJECT.replace("hospital-a", "Hospital"), "clients.0.name"),
        (PROJECT.replace("extra_hosts", "extra_host"), "Did you mean|unknown key"),
        ("clients: []", "project"),
        ("- a", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_project_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "project.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        provision(tmp_path / "project.yaml", tmp_path / "kits")
    assert not (tmp_path / "kits").exists()


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project.yaml").write_text(PROJECT)
    made = []

    def full(self: Kits, newcomer: Newcomer, id: int) -> None:
        made.append(newcomer.name)
        raise StorageError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Kits, "make_client", full)
        with pytest.raises(StorageError):
            provision(tmp_path / "project.yaml", tmp_path / "kits")
    assert made == ["hospital-a"] and not (tmp_path / "kits").exists()
    provision(tmp_path / "project.yaml", tmp_path / "kits")


def test_provisioning_twice_is_refused_and_changes_nothing(kits: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in kits.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="holds a project already"):
        provision(tmp_path / "project.yaml", kits)
    assert {p: p.read_bytes() for p in kits.rglob("*") if p.is_file()} == before


def test_a_damaged_authority_is_named(kits: Path) -> None:
    other = ca.Authority.new("other")
    (kits / "ca" / "ca.key").write_bytes(ca.key_pem(other.key))
    with pytest.raises(ConfigError, match="does not belong to its certificate"):
        renew(kits, [])


def test_the_wrong_kind_of_kit_is_named(kits: Path) -> None:
    with pytest.raises(ConfigError, match="it is a client's kit"):
        ServerKit.read(kits / "hospital-a")
    (kits / "hospital-a" / "client.yaml").write_text("project: trial\nname: hospital-a\nid: 0\nserver: {hots: x}\n")
    with pytest.raises(ConfigError, match=r"client\.yaml: unknown key 'server\.hots'"):
        ClientKit.read(kits / "hospital-a")


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four commands as an operator types them."""
    monkeypatch.chdir(tmp_path)
    Path("project.yaml").write_text(PROJECT)
    run = CliRunner()
    for words in (
        ["project.yaml"],
        ["renew", "hospital-a", "server"],
        ["add", "client", "hospital-d"],
        ["revoke", "hospital-b"],
    ):
        done = run.invoke(app, ["provision", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    issued = json.loads(Path("kits/ca/issued.json").read_text())["issued"]
    assert [(e["name"], e["revoked"]) for e in issued][-4:] == [
        ("hospital-c", False),
        ("hospital-a", False),
        ("server", False),
        ("hospital-d", False),
    ]
    assert [e["revoked"] for e in issued if e["name"] == "hospital-b"] == [True]


def test_reading_a_kit_needs_neither_torch_nor_flower(kits: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedkd.deploy.kit import ClientKit; "
        f"ClientKit.read(Path({str(kits / 'hospital-a')!r})).tls(); "
        "import fedkd.deploy.provision; print([m for m in ('torch', 'flwr', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_systemd_takes_the_units(made: Path, tmp_path: Path) -> None:
    """As its own checker reads them; releases before 254 do not know the two keys of the back-off."""
    checker = shutil.which("systemd-analyze")
    if checker is None:
        pytest.skip("systemd-analyze is not installed here")
    for unit in (made / "kits/server/fedkd-server.service", made / "kits/hospital-a/fedkd-client.service"):
        text = unit.read_text()
        assert text.count("ExecStart=/opt/fedkd/bin/fedkd ") == 1 and "Restart=always" in text
        (tmp_path / unit.name).write_text(text.replace("/opt/fedkd/bin/fedkd", sys.executable))
        done = subprocess.run([checker, "verify", str(tmp_path / unit.name)], capture_output=True, text=True)
        about = [line for line in done.stderr.splitlines() if unit.name in line]
        known = ("Unknown key 'RestartSteps'", "Unknown key 'RestartMaxDelaySec'", "Unknown key name 'Restart")
        assert done.returncode == 0 and all(any(word in line for word in known) for line in about), done.stderr
