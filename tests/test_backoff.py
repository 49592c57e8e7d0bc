"""When what failed is tried again: 1, 2, 4, ... 60 seconds after the try before."""

from longctx.training.backoff import Backoff


def test_tries_are_ever_further_apart_until_one_succeeds():
  backoff, tries = Backoff(), []
  for now in range(100, 400):   # it fails at 100 and goes on failing
    if backoff.due(True, now):
      tries.append(now - 100)
  assert tries == [1, 3, 7, 15, 31, 63, 123, 183, 243]
  assert not backoff.due(False, 400)
  assert [now for now in range(500, 510) if backoff.due(True, now)] == [501, 503, 507]
