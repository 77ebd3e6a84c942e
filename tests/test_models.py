"""Models by name, with options, and the user's own; what does not fit is refused in one sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from harness import assert_same, play
from torch import nn
from user_models import same

from fedkd.engines.stacked import Fallback
from fedkd.errors import ConfigError
from fedkd.models import Architecture

IMAGE, TABLE = (1, 8, 8), (13,)


def bound(name: str, shape: tuple[int, ...] = IMAGE, dtype: torch.dtype = torch.float32) -> Architecture:
    return Architecture(name, shape, 5, dtype)


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("logreg", TABLE, 13),
        ("mlp", TABLE, 128),
        ("mlp", IMAGE, 128),
        ("mlp(hidden=[20, 7], dropout=0.1)", IMAGE, 7),
        ("mlp(hidden=[])", IMAGE, 64),
        ("lenet", (1, 28, 28), 84),
        ("lenet(width=0.5)", (3, 32, 32), 42),
        ("cnn", (1, 28, 28), 32),
        ("cnn(channels=[4], features=9, norm=group)", IMAGE, 9),
        ("cnn(norm=none)", IMAGE, 32),
        ("resnet(width=4)", (3, 9, 11), 16),
        ("user_models:tiny", TABLE, None),
        ("user_models:tiny(width=6)", IMAGE, None),
    ],
)
def test_a_model_by_name_gives_logits_and_says_how_wide_its_features_are(
    name: str, shape: tuple[int, ...], width: int | None
) -> None:
    architecture = bound(name, shape)
    assert architecture.gradients and architecture.features == width
    weights = architecture.initial(3)
    model = architecture.module(weights).eval()
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (4, 5)
    architecture.template.eval()
    out = torch.func.functional_call(
        architecture.template, {f"inner.{n}": t for n, t in weights.items()}, ("forward", x)
    )
    assert torch.allclose(out, model(x), atol=1e-6)
    assert set(architecture.trainable) == {n for n, _ in model.named_parameters()}


def test_the_default_cnn_has_the_sizes_of_fedgens_table() -> None:
    shapes = {n: tuple(t.shape) for n, t in Architecture("cnn", (1, 28, 28), 10, torch.float32).initial(0).items()}
    assert shapes["body.0.weight"] == (6, 1, 3, 3) and shapes["body.3.weight"] == (16, 6, 3, 3)
    assert shapes["body.7.weight"] == (32, 784) and shapes["head.weight"] == (10, 32)


def test_weights_come_from_the_seed_alone() -> None:
    architecture = bound("cnn")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = architecture.initial(7)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert same(first, architecture.initial(7))
    assert not same(first, architecture.initial(8))
    double = bound("cnn", dtype=torch.float64).initial(7)
    assert double["head.weight"].dtype == torch.float64 and double["body.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(double["head.weight"].float(), first["head.weight"])


REFUSED = [
    ("mpl", IMAGE, r"no model is named 'mpl'. Did you mean 'mlp'"),
    ("transformer9000", IMAGE, r"Known: cnn, lenet, lenet_half, logreg, mlp, own, resnet"),
    ("mlp(hidden=[3)", IMAGE, r"options of model"),
    ("mlp(3)", IMAGE, r"mlp\(3\)"),
    ("mlp(hiden=[3])", IMAGE, r"hiden"),
    ("mlp(hidden=3)", IMAGE, r"mlp\(hidden=3\)"),
    ("cnn(norm=layer)", IMAGE, r"norm is 'layer'"),
    ("mlp; rm -rf", IMAGE, r"is not a name"),
    ("cnn", TABLE, r"wants images"),
    ("resnet", TABLE, r"wants images"),
    ("lenet", IMAGE, r"too small"),
    ("user_models:nobody", IMAGE, r"cannot be imported"),
    ("no_such_module_9:Net", IMAGE, r"cannot be imported"),
    ("user_models:wrong_width", IMAGE, r"gives \[2, 6\].*expected logits \[2, 5\]"),
    ("user_models:no_model", IMAGE, r"gave a dict"),
    ("user_models:fails", IMAGE, r"needs a licence"),
    ("user_models:Tied", IMAGE, r"first.weight.*second.weight"),
]


@pytest.mark.parametrize(("name", "shape", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_does_not_fit_is_refused_in_one_sentence(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bound(name, shape)
    text = str(caught.value)
    assert re.search(message, text) and "\n" not in text and text.count(name.split("(")[0].split(";")[0]) >= 1


def test_a_learner_without_gradients() -> None:
    architecture = bound("sklearn.linear_model:LogisticRegression(C=0.5)", TABLE)
    assert not architecture.gradients and architecture.features is None and architecture.initial(0) == {}
    assert architecture.build(0).C == 0.5


def test_a_learner_that_draws_is_seeded() -> None:
    architecture = bound("sklearn.ensemble:RandomForestClassifier(n_estimators=3)", TABLE)
    assert architecture.build(5).random_state == architecture.build(5).random_state is not None
    assert architecture.build(5).random_state != architecture.build(6).random_state
    chosen = bound("sklearn.ensemble:RandomForestClassifier(n_estimators=3, random_state=4)", TABLE)
    assert chosen.build(5).random_state == 4


def local(model: str, **options: Any) -> dict[str, Any]:
    return {"algorithm": "local", "rounds": 2, "models": {"student": model, "devices": [model]}, **options}


UNSTACKABLE = {"OwnNoise": "random", "OddNorm": "BatchNorm3d", "Centred": "other rows", "Counting": "other rows",
               "Picky": "plain tensors"}  # fmt: skip


@pytest.mark.parametrize("name", UNSTACKABLE)
def test_a_model_that_cannot_be_stacked_is_looped_and_gives_the_oracles_numbers(name: str) -> None:
    """Randomness, batch statistics or errors of its own must neither leak between devices nor go unnoticed."""
    from harness import assemble

    model = f"user_models:{name}"
    serial, stacked = play(local(model)), assemble(local(model), kind="stacked")
    with pytest.warns(Fallback) as said:
        stacked.rounds.play(stacked.progress, lambda _, record: stacked.records.append(record))
        seen = stacked.seen
    (line,) = [str(warning.message) for warning in said if warning.category is Fallback]
    assert line.startswith(model) and "looped instead" in line and UNSTACKABLE[name] in line
    assert seen is not None and not any(record["quarantined"] for record in stacked.records)
    assert_same(serial, stacked, 1e-12)


def test_a_large_residual_net_is_looped_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of speed: no word of it, and the same numbers."""
    from fedkd.engines import stacked

    trained: list[int] = []
    loop = stacked.SerialEngine.train

    def train(self: Any, phase: Any, tasks: Any) -> None:
        trained.append(len(tasks))
        loop(self, phase, tasks)

    monkeypatch.setattr(stacked.SerialEngine, "train", train)
    raw = local("resnet(width=4)", rounds=1)
    small = play(raw, kind="stacked")
    assert not trained
    monkeypatch.setattr(stacked, "LOOP_FROM_FLOPS", 1e6)
    large = play(raw, kind="stacked")
    assert sum(trained) == 8
    assert_same(small, large, 1e-9)
    trained.clear()
    play(local("mlp", rounds=1), kind="stacked")
    assert not trained, "what the kernels take, and dense layers, are stacked whatever their size"


@pytest.mark.parametrize("name", ["mlp(dropout=0.3)", "lenet", "cnn", "cnn(norm=group)", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_models_of_the_library_can_be_stacked(name: str, dtype: torch.dtype) -> None:
    assert Architecture(name, (1, 28, 28), 10, dtype).unstackable is None


def test_swapping_layers_does_not_touch_what_is_exported() -> None:
    architecture = bound("cnn")
    assert type(architecture.module(architecture.initial(0)).body[0]) is nn.Conv2d
