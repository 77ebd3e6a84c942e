"""Branches and peers: the user's own model is multiplied after a stage, taught, and comes back in its own form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.online import Branches, Gate, gated_losses, mutual, one
from fedkd.errors import ConfigError
from fedkd.losses import CrossEntropy
from fedkd.models import Architecture


def digits() -> Records:
    bunch = load_digits()
    x = torch.from_numpy(np.asarray(bunch.images, np.float32) / 16)[:, None]
    return Records.of(x, torch.from_numpy(np.asarray(bunch.target, np.int64)))


class Own(nn.Module):
    """A user's model: a stem, a stage with a shortcut inside, batch normalisation after it, functions in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.last(torch.relu(self.stem(x)))))
        out: Tensor = self.fc(h.view(h.shape[0], -1))
        return out


class Around(Own):
    def forward(self, x: Tensor) -> Tensor:
        s = self.stem(x)
        return super().forward(x) + s.mean((1, 2, 3)).unsqueeze(1)


def test_each_branch_is_the_model_of_its_own_weights() -> None:
    torch.manual_seed(1)
    net, x = Own(), torch.randn(5, 1, 8, 8)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    many = Branches(net, "last", 3, x, seed=1).eval()
    logits = many(x)
    assert logits.shape == (3, 5, 10)
    for i in range(3):
        own = many.branch(i)
        assert type(own) is Own and own.state_dict().keys() == before.keys()
        assert torch.allclose(own.eval()(x), logits[i], atol=1e-6)
    assert torch.allclose(net.eval()(x), logits[0], atol=1e-6), "the first starts from the model's weights"
    assert float((logits[0] - logits[1]).detach().abs().max()) > 0.01, "the others do not"
    assert all(bool((t == before[n]).all()) for n, t in net.state_dict().items())
    assert torch.equal(many.branch(1).get_parameter("stem.weight"), many.branch(2).get_parameter("stem.weight"))


def test_stages_that_cannot_be_branched_are_told() -> None:
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"no layer 'lost'.*last"):
        Branches(Own(), "lost", 2, x, 1)
    with pytest.raises(ConfigError, match="at least 2"):
        Branches(Own(), "last", 1, x, 1)
    with pytest.raises(ConfigError, match="path around the stage"):
        Branches(Around(), "last", 3, torch.randn(5, 1, 8, 8), 1)


def test_the_gate_weighs_branches() -> None:
    weights = Gate(4, 3)(torch.randn(7, 4, 2, 2))
    assert weights.shape == (7, 3) and torch.allclose(weights.sum(1), torch.ones(7))


@pytest.mark.parametrize("way", ["one", "dml", "dml-trunk", "dml-others"])
def test_students_teach_each_other(way: str) -> None:
    data = digits()
    train = Records.of(data.x(np.arange(600)), None if data.y is None else data.y[:600])
    test = Records.of(data.x(np.arange(1200, 1797)), None if data.y is None else data.y[1200:])
    torch.manual_seed(2)
    how = Fit(epochs=6, lr=0.1, batch_size=50)
    if way == "one":
        taught = one(Own(), "last", train, branches=2, ramp=4, fit=how)
    elif way == "dml-others":
        wide = Architecture("mlp(hidden=[32])", (1, 8, 8), 10, torch.float32)
        taught = mutual(Own(), train, others=[wide.module(wide.initial(1))], fit=how)
    else:
        taught = mutual(Own(), train, stage="last" if way == "dml-trunk" else None, peers=2, fit=how)
    assert accuracy(taught.deployed, test) > 0.75 and type(taught.deployed) is Own
    assert len(taught.members) == 2 and len(taught.log) == 6
    p = taught.ensemble(test.x(np.arange(9)))
    assert torch.allclose(p.sum(1), torch.ones(9), atol=1e-5)
    first = list(taught.log[0].terms)
    assert first == (["branches", "ensemble", "distillation"] if way == "one" else ["labels", "peers"])
    # It can be trained on like any model: nothing of the branches is left in it.
    Distiller(taught.deployed, None, [Term(CrossEntropy(), 1.0)], fit=Fit(epochs=1)).fit(train)


def test_the_gated_ensemble_teaches_its_branches() -> None:
    """Lan et al. 2018, eq. (3)-(8), record by record."""
    stream = torch.Generator().manual_seed(4)
    z = torch.randn(3, 5, 4, generator=stream, dtype=torch.float64).requires_grad_()
    g = torch.randn(5, 3, generator=stream, dtype=torch.float64).softmax(1).requires_grad_()
    y = torch.tensor([0, 3, 1, 1, 2])

    def chances(scores: np.ndarray, temperature: float) -> np.ndarray:
        e = np.exp(scores / temperature)
        return np.asarray(e / e.sum())

    own, mixed, teach = 0.0, 0.0, 0.0
    for n in range(5):
        branches = z[:, n].detach().numpy()
        together = sum(float(g[n, i].detach()) * branches[i] for i in range(3))
        mixed -= np.log(chances(together, 1)[y[n]]) / 5
        for branch in branches:
            own -= np.log(chances(branch, 1)[y[n]]) / 5
            p, q = chances(together, 3), chances(branch, 3)
            teach += 9 * (p * np.log(p / q)).sum() / 5
    found = gated_losses(z, g, y, 3.0)
    assert [float(v.detach()) for v in found] == pytest.approx([own, mixed, teach], rel=1e-10)
    (gate,) = torch.autograd.grad(found[2], g, allow_unused=True, retain_graph=True)
    assert gate is None, "the ensemble teaches, and does not follow its branches"
    assert bool(torch.autograd.grad(found[1], g)[0].any())


def test_the_losses_are_the_papers() -> None:
    """One step that moves nothing: its logged losses against the formulas, on the members' own answers."""
    data = digits()
    train = Records.of(data.x(np.arange(60)), None if data.y is None else data.y[:60])
    assert train.y is not None
    torch.manual_seed(3)
    net = Own()
    still = Fit(epochs=1, lr=1e-12, momentum=0.0, weight_decay=0.0, batch_size=60)

    def probabilities(members: list[nn.Module]) -> list[np.ndarray]:
        with torch.no_grad():  # in training mode: batch statistics, as in the step
            return [m.train()(train.x(np.arange(60))).double().softmax(1).numpy() for m in members]

    taught = mutual(net, train, peers=3, fit=still)
    p = probabilities(taught.members)
    own = sum(-np.log(q[np.arange(60), train.y.numpy()]).mean() for q in p)
    pairs = sum((b * np.log(b / a)).sum(1).mean() for i, a in enumerate(p) for j, b in enumerate(p) if i != j)
    assert taught.log[0].terms["labels"] == pytest.approx(own, rel=1e-4)
    assert taught.log[0].terms["peers"] == pytest.approx(pairs / 2, rel=1e-4)
    gated = one(net, "last", train, branches=3, ramp=1, fit=still)
    own = sum(-np.log(q[np.arange(60), train.y.numpy()]).mean() for q in probabilities(gated.members))
    assert gated.log[0].terms["branches"] == pytest.approx(own, rel=1e-4)
    assert gated.log[0].terms["distillation"] > 0
    with pytest.raises(ConfigError, match="labelled"):
        mutual(net, Records.of(train.x(np.arange(9))))
