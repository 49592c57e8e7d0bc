"""What RULER's table says of a model: averages over lengths, and up to which it is good enough.

Hsieh et al. 2024, arXiv:2404.06654, table 3. With the mean score s_i of the thirteen tasks at the
i-th of n lengths, from short to long:

    average                mean of s_i
    wAvg. (inc)            sum of i s_i / sum of i: who reads long texts
    wAvg. (dec)            sum of (n + 1 - i) s_i / sum of i: who reads short ones
    effective length       the longest whose s_i is at least 85.6, Llama-2-7B-chat's at 4096

Held by: tests/test_ruler_summary.py (rows of the published table).
"""

from collections.abc import Mapping

from longctx.errors import check, check_range

THRESHOLD = 85.6


def _scores(scores_by_length: Mapping[int, float]) -> list[float]:
  """In the order of their lengths."""
  check(bool(scores_by_length), 'scores_by_length={}: has no score; give one for each length, in '
        'percent')
  for length, score in scores_by_length.items():
    check_range(f'scores_by_length[{length}]', score, 0, 100)
  return [score for _, score in sorted(scores_by_length.items())]


def effective_length(scores_by_length: Mapping[int, float],
                     threshold: float = THRESHOLD) -> int | None:
  """The longest length whose score, in percent, reaches the threshold; None if none does."""
  _scores(scores_by_length)
  return max((length for length, score in scores_by_length.items() if score >= threshold),
             default=None)


def average(scores_by_length: Mapping[int, float]) -> float:
  scores = _scores(scores_by_length)
  return sum(scores) / len(scores)


def weighted_average(scores_by_length: Mapping[int, float], *, rising: bool) -> float:
  """wAvg. (inc) if weights rise with the length, else wAvg. (dec)."""
  scores = _scores(scores_by_length)
  weights = range(1, len(scores) + 1) if rising else range(len(scores), 0, -1)
  return sum(w * s for w, s in zip(weights, scores)) / sum(weights)
