"""The bootstrap interval holds what it promises."""

from __future__ import annotations

import numpy as np

from longlive_rag.intervals import bootstrap_interval


def test_the_interval_holds_the_true_mean_about_19_times_in_20() -> None:
    generator = np.random.default_rng(3)
    samples = generator.normal(2.0, 1.5, (400, 40))
    covered = [low < 2.0 < high for low, high in map(bootstrap_interval, samples)]
    # A percentile bootstrap of 40 numbers covers a little less than it says; 400 trials are sure to 0.02.
    assert 0.90 < np.mean(covered) < 0.97


def test_every_column_has_its_own_interval() -> None:
    values = np.random.default_rng(4).random((12, 3))
    low, high = bootstrap_interval(values, draws=500)
    assert low.shape == high.shape == (3,)
    for column in range(3):
        alone = bootstrap_interval(values[:, column], draws=500)
        # The same draws, summed in another order.
        np.testing.assert_allclose((low[column], high[column]), alone, rtol=1e-12)
    assert (low < values.mean(axis=0)).all() and (values.mean(axis=0) < high).all()
    same = bootstrap_interval(np.full(5, 0.25))
    np.testing.assert_allclose(same, (0.25, 0.25), rtol=1e-12)
