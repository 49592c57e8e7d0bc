"""Which steps are spikes, against a loop; and that such a step changes nothing."""

import jax
import numpy as np
import pytest

from longctx.training import spikes


def by_loop(losses, norms, window, sigmas):
  """What a reader of the rule would skip, in float64, over lists."""
  kept, found = ([], []), []
  for pair in zip(losses, norms):
    limits = []
    for values in kept:
      last = np.array(values[-window:], np.float64)
      limits.append(last.mean() + sigmas * last.std() if len(values) >= max(2, window // 2) else np.inf)
    finite = bool(np.isfinite(pair).all())
    found.append(finite and any(x > limit for x, limit in zip(pair, limits)))
    if finite:
      for values, x, limit in zip(kept, pair, limits):
        values.append(min(x, limit))
  return found


@pytest.mark.parametrize('window,sigmas', [(4, 3.0), (8, 2.0), (16, 6.0)])
def test_the_rule_is_the_loops(window, sigmas):
  r = np.random.default_rng(window)
  losses = 5 * np.exp(-np.arange(80) / 30) + 0.1 * r.normal(size=80)
  norms = np.exp(0.3 * r.normal(size=80))
  losses[[3, 40, 41, 60]] += 9        # before half a window is known; two in a row; a late one
  norms[[25, 50]] *= 40
  losses[[30, 45]] = np.nan
  norms[33] = np.inf
  recent, found, judge = spikes.no_history(window), [], jax.jit(spikes.judge, static_argnums=3)
  for loss, norm in zip(losses, norms):
    spike, recent = judge(recent, np.float32(loss), np.float32(norm), sigmas)
    found.append(bool(spike))
  expected = by_loop(np.float32(losses), np.float32(norms), window, sigmas)
  assert found == expected
  assert sum(expected) >= 3 and not found[30] and not found[33]
  assert int(recent.count) == 80 - 3


def test_a_lasting_change_of_level_is_taken_after_a_while():
  recent, r = spikes.no_history(8), np.random.default_rng(0)
  taken = []
  for i in range(60):
    spike, recent = spikes.judge(recent, np.float32((i >= 20) + 0.01 * r.normal()), np.float32(1), 6.0)
    taken.append(not spike)
  assert all(taken[:20]) and not taken[20] and all(taken[-10:])
