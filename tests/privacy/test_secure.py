"""Secure sums: exact for whoever stays, uniform for whoever looks, and refused where a step is out of order."""

from __future__ import annotations

import contextlib
import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from fedkd.privacy.noise import NoiseSource
from fedkd.privacy.secure import heads, masks, protocol, shamir, skellam
from fedkd.privacy.secure.heads import SecureSumError, session_id
from fedkd.privacy.secure.protocol import Collector, Session, Terms, residues, signed
from fedkd.privacy.secure.quantise import Grid, bits_for, one_hot
from tests.privacy.secure_parties import run

CLIENTS, LENGTH, LARGEST = 50, 400, 4096
BITS = bits_for(CLIENTS, LARGEST, 0)
TERMS = Terms(length=LENGTH, bits=BITS)


def vectors(clients: int = CLIENTS, length: int = LENGTH, seed: int = 0) -> dict[int, np.ndarray]:
    """Every entry at its largest magnitude somewhere, so that a modulus too small would wrap around."""
    rng = np.random.default_rng(seed)
    found = {k: rng.integers(-LARGEST, LARGEST + 1, length) for k in range(clients)}
    for vector in found.values():
        vector[0], vector[1] = LARGEST, -LARGEST
    return found


# ---- the sum --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["keys", "deal", "relay", "masked", "unmask"])
def test_the_sum_of_the_rest_is_exact_when_ten_of_fifty_drop_out(step):
    given_ = vectors()
    ran = run(given_, TERMS, silent={step: range(10)})
    # Whoever falls silent after its vector was sent is in the sum.
    stay = set(range(CLIENTS)) if step == "unmask" else set(range(10, CLIENTS))
    assert ran.survivors == stay
    assert np.array_equal(ran.total, np.sum([given_[k] for k in stay], axis=0))


def test_ten_drop_out_at_every_stage_of_one_session():
    given_ = vectors()
    silent = {"keys": range(10), "deal": range(10, 20), "masked": range(20, 30), "unmask": range(30, 40)}
    ran = run(given_, Terms(length=LENGTH, bits=BITS, threshold=0.2), silent=silent)
    assert ran.survivors == set(range(30, 50))
    assert np.array_equal(ran.total, np.sum([given_[k] for k in range(30, 50)], axis=0))


def test_a_vector_that_comes_too_late_is_left_out_and_stays_hidden():
    given_ = vectors(6)
    ran = run(given_, TERMS, late=[2])
    assert ran.survivors == {0, 1, 3, 4, 5}
    assert np.array_equal(ran.total, np.sum([given_[k] for k in (0, 1, 3, 4, 5)], axis=0))
    # The server has recovered its mask key, and takes off every mask between two devices; its own mask stays on.
    rows = protocol.unpack(protocol._stream(TERMS), heads.read(ran.replies[-3], heads.MASKED, 2, ran.server.id))
    left = rows.copy()
    for other in (0, 1, 3, 4, 5):
        left -= protocol.pair_mask(ran.devices[2].mask_key, ran.server.roster[other][1], ran.server.id, 2, other, TERMS)
    assert np.abs(signed(left, BITS)).max() > LARGEST
    left -= masks.expand(ran.devices[2].own_seed, LENGTH, BITS)
    assert np.array_equal(signed(left, BITS), given_[2])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 200))
def test_no_wrap_around_at_the_extremes(devices, largest, noise, length):
    try:
        bits = bits_for(devices, largest, noise)
    except ValueError:
        assert 2 * devices * (largest + noise) >= 2**31
        return
    top = np.full(length, largest + noise, np.int64)
    for sign in (1, -1):
        total = np.zeros(length, np.uint32)
        for _ in range(devices):
            total += residues(sign * top, bits)
        assert np.array_equal(signed(total, bits), sign * devices * top)
    if bits > 2:
        with np.errstate(over="ignore"):
            small = bits - 1
            wrapped = signed(residues(devices * top, small), small)
        assert largest + noise == 0 or not np.array_equal(wrapped, devices * top)


# ---- what the server sees -------------------------------------------------------------------------------------------
def uniformity(values: np.ndarray, bits: int) -> float:
    """p-value that residues modulo 2^bits are uniform, by chi-square on their top four and their lowest four bits."""
    values = values.astype(np.int64)
    found = []
    for part in (values >> (bits - 4), values & 15):
        found.append(stats.chisquare(np.bincount(part.reshape(-1), minlength=16)).pvalue)
    return min(found)


def server_views(ran, terms) -> dict[str, np.ndarray]:
    """What an honest-but-curious server can compute but the sum: vectors as they came, without the devices' own masks
    (which it recovers), without the pairwise masks of those who dropped out, and sums over parts of the survivors."""
    server, stay = ran.server, sorted(ran.survivors)
    plain = {k: server.vectors[k].copy() for k in stay}
    opened = {}
    for k in stay:
        opened[k] = plain[k] - masks.expand(ran.devices[k].own_seed, terms.length, terms.bits)
        for lost in set(server.dealt) - set(stay):
            key = ran.devices[lost].mask_key
            opened[k] = opened[k] + protocol.pair_mask(key, server.roster[k][1], server.id, lost, k, terms)
    mask = masks.modulus_mask(terms.bits)
    views = {f"vector {k}": plain[k] & mask for k in stay}
    views |= {f"opened {k}": opened[k] & mask for k in stay}
    rng = np.random.default_rng(1)
    for i in range(20):
        some = rng.choice(stay, size=rng.integers(2, len(stay)), replace=False)
        views[f"sum of part {i}"] = np.sum([opened[k] for k in some], axis=0, dtype=np.uint32) & mask
    return views


def small_inputs(clients: int, length: int) -> dict[int, np.ndarray]:
    return {k: np.full(length, k % 5, np.int64) for k in range(clients)}


def transcript_is_uniform(terms: Terms) -> bool:
    ran = run(small_inputs(8, terms.length), terms, silent={"masked": [6, 7]})
    views = server_views(ran, terms)
    assert np.array_equal(ran.total, np.full(terms.length, sum(k % 5 for k in range(6))))
    # Bonferroni: a correct protocol fails once in 10^4 tests.
    return min(uniformity(v, terms.bits) for v in views.values()) > 1e-4 / (2 * len(views))


VIEW = Terms(length=4000, bits=20)


def test_the_servers_view_without_the_sum_is_uniform():
    assert transcript_is_uniform(VIEW)


@pytest.mark.parametrize("omitted", ["all masks", "pairwise masks", "own mask"])
def test_the_view_is_found_out_where_masks_are_omitted(monkeypatch, omitted):
    """Mutants that leave the sum right: only the transcript can tell."""
    expand = masks.expand
    if omitted == "all masks":
        monkeypatch.setattr(protocol, "expand", lambda seed, count, bits: np.zeros(count, np.uint32))
    elif omitted == "own mask":
        # Then nothing hides a late vector: its masks with the others are recovered.
        real = Session.masked
        seeds: set[bytes] = set()

        def masked(self, vector, terms):
            seeds.add(self.own_seed)
            return real(self, vector, terms)

        monkeypatch.setattr(Session, "masked", masked)
        monkeypatch.setattr(
            protocol,
            "expand",
            lambda s, count, bits: np.zeros(count, np.uint32) if s in seeds else expand(s, count, bits),
        )
        ran = run(small_inputs(6, VIEW.length), VIEW, late=[2])
        body = heads.read(ran.replies[-3], heads.MASKED, 2, ran.server.id)
        left = protocol.unpack(protocol._stream(VIEW), body).copy()
        for other in (0, 1, 3, 4, 5):
            key = ran.devices[2].mask_key
            left -= protocol.pair_mask(key, ran.server.roster[other][1], ran.server.id, 2, other, VIEW)
        assert uniformity(left & masks.modulus_mask(VIEW.bits), VIEW.bits) < 1e-9
        return
    else:

        def weak(private, public, session, own, other, terms):
            return np.zeros(terms.length, np.uint32)

        monkeypatch.setattr(protocol, "pair_mask", weak)
    assert not transcript_is_uniform(VIEW)


def test_masks_come_from_256_bits_and_differ_by_run_round_and_pair():
    a, b = Session.open(session_id("run", 0), 0), Session.open(session_id("run", 0), 1)
    pair = [
        protocol.pair_mask(a.mask_key, masks.public_key(b.mask_key), id, 0, 1, TERMS)
        for id in (session_id("run", 0), session_id("run", 1), session_id("ran", 0))
    ]
    other = protocol.pair_mask(b.mask_key, masks.public_key(a.mask_key), session_id("run", 0), 1, 0, TERMS)
    assert not ((pair[0] + other) & masks.modulus_mask(BITS)).any()
    assert not np.array_equal(pair[0], pair[1]) and not np.array_equal(pair[0], pair[2])
    assert len(a.own_seed) == len(a.mask_key) == 32 and a.own_seed != b.own_seed


# ---- Shamir ---------------------------------------------------------------------------------------------------------
def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_gives_another():
    secret = secrets.token_bytes(32)
    points = list(range(1, 21))
    shares = dict(zip(points, shamir.share(secret, points, 8), strict=True))
    for some in (points[:8], points[5:13], points[12:], points):
        assert shamir.reconstruct(shares, shamir.weights(some)) == secret
    few = points[:7]
    with contextlib.suppress(ValueError):
        assert shamir.reconstruct(shares, shamir.weights(few)) != secret
    assert max(shares.values()) < shamir.PRIME


@pytest.mark.parametrize(("points", "threshold"), [([1, 2], 3), ([1, 1], 1), ([0, 1], 1), ([1, 2], 0)])
def test_shamir_refuses_points_that_give_a_secret_away(points, threshold):
    with pytest.raises(ValueError):
        shamir.share(bytes(32), points, threshold)


# ---- what a device refuses ------------------------------------------------------------------------------------------
def dealt(clients: int = 5, terms: Terms = TERMS) -> tuple[Collector, dict[int, Session]]:
    session = session_id("run", 3)
    server, devices = Collector(terms, session), {k: Session.open(session, k) for k in range(clients)}
    for k, device in devices.items():
        server.take_keys(k, device.keys())
    roster = server.roster_message()
    for k, device in devices.items():
        server.take_shares(k, device.deal(roster, terms))
    for k, device in devices.items():
        server.take_ready(k, device.relay(server.relay_message(k), terms))
    return server, devices


def sent() -> tuple[Collector, dict[int, Session]]:
    server, devices = dealt()
    for k, device in devices.items():
        server.take_masked(k, device.masked(residues(np.zeros(LENGTH, np.int64), BITS), TERMS))
    return server, devices


def test_a_step_is_answered_once_and_in_its_order():
    server, devices = sent()
    names = server.survivors_message()
    devices[0].unmask(names, TERMS)
    with pytest.raises(SecureSumError, match="once"):
        devices[0].unmask(names, TERMS)
    with pytest.raises(SecureSumError, match="once"):
        devices[1].masked(residues(np.zeros(LENGTH, np.int64), BITS), TERMS)
    with pytest.raises(SecureSumError, match="once"):
        Session.open(server.id, 0).unmask(names, TERMS)


def test_no_device_gives_away_both_secrets_of_another():
    server, devices = sent()
    body = devices[0].unmask(server.survivors_message(), TERMS)
    rows = list(protocol._rows(body[heads.HEAD.size :], protocol._ROW_SHARE, "shares"))
    assert [client for client, _, _ in rows] == sorted({client for client, _, _ in rows}) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("names", "why"),
    [([0, 1], "at least"), ([1, 2, 3], "not among"), ([0, 1, 2, 9], "not all"), ([0, 2, 1], "ascending")],
)
def test_a_device_refuses_a_list_of_survivors_that_would_undress_somebody(names, why):
    server, devices = sent()
    rows = b"".join(protocol._ROW_ID.pack(k) for k in names)
    with pytest.raises(SecureSumError, match=why):
        devices[0].unmask(heads.write(heads.UNMASK, heads.SERVER, server.id, rows), TERMS)


def test_a_device_refuses_a_roster_that_is_too_small_or_shows_other_keys():
    session = session_id("run", 0)
    devices = {k: Session.open(session, k) for k in range(4)}
    server = Collector(Terms(length=LENGTH, bits=BITS, minimum=2), session)
    for k in (0, 1):
        server.take_keys(k, devices[k].keys())
    with pytest.raises(SecureSumError, match="at least 3"):
        devices[0].deal(server.roster_message(), TERMS)
    for k in (2, 3):
        server.take_keys(k, devices[k].keys())
    server.roster[0] = server.roster[1]
    with pytest.raises(SecureSumError, match="own keys"):
        devices[0].deal(server.roster_message(), TERMS)
    with pytest.raises(SecureSumError, match="one key"):
        devices[1].deal(server.roster_message(), TERMS)


def test_a_changed_share_is_noticed():
    session = session_id("run", 0)
    server, devices = Collector(TERMS, session), {k: Session.open(session, k) for k in range(4)}
    for k, device in devices.items():
        server.take_keys(k, device.keys())
    roster = server.roster_message()
    for k, device in devices.items():
        server.take_shares(k, device.deal(roster, TERMS))
    cipher = bytearray(server.dealt[1][0])
    cipher[5] ^= 1
    server.dealt[1][0] = bytes(cipher)
    with pytest.raises(SecureSumError, match="changed"):
        devices[0].relay(server.relay_message(0), TERMS)


def test_the_server_outlives_any_bytes_from_a_device():
    server, devices = dealt()
    rng = np.random.default_rng(0)
    good = devices[1].masked(residues(np.zeros(LENGTH, np.int64), BITS), TERMS)
    cases = [b"", good[:10], good[:-1], good + b"x", rng.bytes(len(good)), server.opening()]
    cases += [heads.write(step, 1, server.id, rng.bytes(99)) for step in heads.STEPS]
    for body in cases:
        for take in (server.take_keys, server.take_shares, server.take_ready, server.take_masked):
            with pytest.raises(SecureSumError):
                take(1, body)
    with pytest.raises(SecureSumError, match="party 2"):
        server.take_masked(2, good)
    server.take_masked(1, good)
    with pytest.raises(SecureSumError, match="already"):
        server.take_masked(1, good)


def test_a_forged_share_spoils_no_sum_unseen():
    """A liar among the helpers: the recovered mask key does not fit the key that was shown, and the round fails by name."""
    given_ = vectors(8)
    ran = run(given_, TERMS, silent={"masked": [7]})
    liar = bytearray(ran.replies[0])
    liar[-1] ^= 1  # the last row is device 7's mask key
    with pytest.raises(SecureSumError, match="device 7"):
        ran.server.total({**ran.replies, 0: bytes(liar)})


def test_a_session_survives_the_end_of_a_devices_process():
    server, devices = dealt()
    for k, device in devices.items():
        again = Session.load(device.dump())
        server.take_masked(k, again.masked(residues(np.full(LENGTH, k, np.int64), BITS), TERMS))
        devices[k] = Session.load(again.dump())
    names = server.survivors_message()
    total = server.total({k: d.unmask(names, TERMS) for k, d in devices.items()})
    assert np.array_equal(total, np.full(LENGTH, 10))


# ---- Skellam noise --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variance", [0.3, 9.0, 2500.0, 1e6])
def test_skellam_noise_has_its_variance_and_not_two_thirds_or_three_halves_of_its_deviation(variance):
    x = skellam.draw(variance, 100_000, NoiseSource()).astype(float)
    assert abs(x.mean()) < 5 * np.sqrt(variance / len(x))

    def fits(sd: float) -> bool:
        kurtosis = 3 + 1 / variance
        return abs((x**2).mean() / sd**2 - 1) < 5 * np.sqrt((kurtosis - 1) / len(x)) * max(1, variance / sd**2)

    sd = np.sqrt(variance)
    assert fits(sd) and not fits(2 / 3 * sd) and not fits(3 / 2 * sd)
    assert np.abs(x).max() <= skellam.reach(variance)


def test_skellam_noise_follows_its_law():
    variance, count = 4.0, 200_000
    x = skellam.draw(variance, count, NoiseSource())
    inner = np.arange(-7, 8)
    seen = np.array([(x == k).sum() for k in inner] + [(np.abs(x) > 7).sum()])
    law = stats.skellam.pmf(inner, variance / 2, variance / 2)
    assert stats.chisquare(seen, count * np.append(law, 1 - law.sum())).pvalue > 1e-5


def test_small_noises_of_devices_add_up_to_the_noise_that_is_accounted():
    variance, devices = 50.0, 10
    total = sum(skellam.draw(variance / devices, 100_000, NoiseSource()) for _ in range(devices))
    inner = np.arange(-20, 21)
    seen = np.array([(total == k).sum() for k in inner] + [(np.abs(total) > 20).sum()])
    law = stats.skellam.pmf(inner, variance / 2, variance / 2)
    assert stats.chisquare(seen, 100_000 * np.append(law, 1 - law.sum())).pvalue > 1e-5


@pytest.mark.parametrize("variance", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("order", [2, 8, 32])
def test_the_bound_on_skellam_noise_is_above_the_true_divergence_and_near_it(variance, shift, order):
    k = np.arange(-35, 36) if variance < 5 else np.arange(-90, 91)
    log_p, log_q = np.log(special.ive(np.abs(k), variance)), np.log(special.ive(np.abs(k - shift), variance))
    true = special.logsumexp(order * log_p + (1 - order) * log_q) / (order - 1)
    bound = skellam.divergence(order, variance, shift, shift)
    assert true <= bound
    assert bound < 1.15 * true or variance < 100 or order * shift > 20


# ---- quantising -----------------------------------------------------------------------------------------------------
HOSTILE = [
    np.zeros((5, 10)),
    np.full((5, 10), 1e300),
    np.full((5, 10), np.nan),
    np.full((5, 10), -np.inf),
    np.where(np.eye(5, 10) > 0, np.inf, np.nan),
    np.eye(5, 10),
]


@pytest.mark.parametrize("labels", HOSTILE)
@pytest.mark.parametrize("clip", [0.001, 0.5, 2.0, 1e6])
def test_no_answer_exceeds_its_norm(labels, clip):
    grid = Grid(scale=4096, clip=clip)
    found = grid.quantise(labels)
    assert found.dtype == np.int64
    assert int(found @ found) <= grid.l2**2 and np.abs(found).max() <= grid.largest
    assert np.abs(found).sum() <= grid.l1(found.size)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 3.0), st.floats(100, 1e5))
def test_no_random_answer_exceeds_its_norm(seed, clip, scale):
    labels = np.random.default_rng(seed).dirichlet(np.full(10, 0.1), 20)
    grid = Grid(scale=scale, clip=clip)
    found = grid.quantise(labels)
    assert int(found @ found) <= grid.l2**2


def test_the_mean_of_quantised_labels_is_the_mean_of_the_labels():
    rng = np.random.default_rng(0)
    labels = rng.dirichlet(np.full(10, 0.3), (7, 30))
    grid = Grid(scale=2**14, clip=None)
    total = np.sum([grid.quantise(p) for p in labels], axis=0)
    assert np.abs(grid.mean(total, 7, 10) - labels.mean(0)).max() < 1 / 2**14


def test_one_hot_votes_have_the_norm_that_is_accounted():
    votes = np.array([0, 9, 3, -1, 10, 2**40])
    found = one_hot(votes, 10)
    assert found.sum() == 3 and found @ found <= len(votes)
