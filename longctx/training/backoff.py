"""When to try again what has failed: after 1 second, then 2, 4, ... and at most a minute each.

Held by: tests/test_backoff.py.
"""

FIRST, MOST = 1.0, 60.0   # seconds


class Backoff:
  """`due` says that it is time for another try, once a try."""

  def __init__(self):
    self.delay, self.at = FIRST, None   # seconds until the next try, and when that is

  def due(self, failing: bool, now: float) -> bool:
    """Whether to try again `now` (seconds), where the last try that ended has failed."""
    if not failing:
      self.delay, self.at = FIRST, None
      return False
    if self.at is None:
      self.at = now + self.delay
    if now < self.at:
      return False
    self.delay = min(2 * self.delay, MOST)
    self.at = now + self.delay
    return True
