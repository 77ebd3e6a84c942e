"""The bias of a class that was never seen."""

from __future__ import annotations

import pytest
import torch

from fedkd.distill.bias import tuned_bias
from fedkd.errors import ConfigError


def test_no_other_bias_is_better() -> None:
    stream = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (400,), generator=stream)
    logits = torch.randn(400, 4, generator=stream)
    logits[torch.arange(400), labels] += 1.5
    logits[:, 2] -= 2.0  # a class that the student never saw

    def right(b: float) -> int:
        moved = logits.clone()
        moved[:, 2] += b
        return int((moved.argmax(1) == labels).sum())

    best = tuned_bias(logits, labels, 2)
    assert right(best) == max(right(b) for b in torch.linspace(-5, 8, 2000).tolist())
    assert right(best) > right(0.0) + 20 and 1.0 < best < 3.0
    with pytest.raises(ConfigError, match="no held-out record"):
        tuned_bias(logits[labels != 2], labels[labels != 2], 2)
