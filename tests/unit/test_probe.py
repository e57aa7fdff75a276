"""Probes: how good embeddings are, by sums that sites add up."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from strategies.distillation import probe


def test_probes_read_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (400,), generator=generator)
    noise = torch.randn(400, 6, generator=generator)
    clear = 5 * F.one_hot(targets, 6) + noise
    for count in (probe.linear, probe.nearest):
        assert float(count(clear, targets)) / 400 > 0.95
        assert float(count(noise, targets)) / 400 < 0.4
    assert float(probe.linear(clear[:3], targets[:3])) == 0
    assert float(probe.nearest(clear[:1], targets[:1])) == 0


def test_probes_agree_with_scikit_learn() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(3, (60,), generator=generator)
    x = F.one_hot(targets, 4) + torch.randn(60, 4, generator=generator)
    voted = cross_val_predict(
        KNeighborsClassifier(5, metric="cosine", algorithm="brute"), x, targets, cv=LeaveOneOut()
    )
    assert float(probe.nearest(x, targets)) == (voted == targets.numpy()).sum()
    right = 0
    for fold in range(5):
        asked = torch.arange(60) % 5 == fold
        known = x[~asked].double()
        mean, scale = known.mean(0), known.std(0)
        fitted = Ridge(alpha=1e-9 * len(known)).fit(
            ((known - mean) / scale).numpy(), F.one_hot(targets[~asked], 3).numpy()
        )
        given = torch.tensor(fitted.predict(((x[asked].double() - mean) / scale).numpy()))
        right += int((given.argmax(1) == targets[asked]).sum())
    assert float(probe.linear(x, targets, ridge=1e-9)) == right
