"""The 95 % interval of a ratio of sums, such as nats per byte, were other documents drawn.

Tokens of a document are alike (its subject, its author, its repetitions), so that not tokens but documents are
what was drawn. Of each document d are summed x (nats) and y (bytes, or tokens); R = X / Y of the sums over all.

    var R = n / (n - 1) sum_d (x_d - R y_d)^2 / Y^2        n documents that have some y
    R +- t(v) sqrt(var R)                                  v = Y^2 / sum_d y_d^2 - 1, at least 1

Source: Cochran 1977, Sampling Techniques, chapter 6 (the linearised ratio). Differs: v counts as many documents
as of one size would weigh as much (Kish 1965), not n - 1: where a few are most of the text n - 1 is far too many,
and of 100 intervals 75 to 90 hold the truth, not 95. Where the documents weigh less than EVEN of one size (two, one
of which is 0.89 of both) no interval holds what it says, and there is none.
Two checkpoints on one text, and two bins of one pass, have documents in common: their difference spreads less than
these intervals say.
Held by: tests/test_perplexity_interval.py (NumPy by definition, coverage).

D documents  K quantities, summed over a document  N columns: bins of context position, and all of them together
"""

import math

import numpy as np

EVEN = 1.25   # documents of one size
Z = 1.959964   # of a normal distribution, 95 % lie within
T = (12.706205, 4.302653, 3.182446)   # of Student's, with 1, 2 and 3 degrees of freedom


def student(v: float) -> float:
  """Within how many standard errors 95 % lie, of v >= 1 degrees of freedom, whole or not.

  Right to 0.1 % of 3 and more, to 3 % (and never too few) of less.
  """
  if v <= 3:   # log t is nearly a line in 1 / v
    return math.exp(np.interp(1 / v, (1 / 3, 1 / 2, 1), np.log(T[::-1])))
  # Cornish and Fisher's series, Abramowitz & Stegun 26.7.5.
  terms = ((Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
           (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
           (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160)
  return Z + sum(term / v**power for power, term in enumerate(terms, 1))


def half_width(documents: int, x: float, y: float, xx: float, xy: float, yy: float) -> float | None:
  """Half of the interval of x / y; None: too few documents tell, or a sum is not finite.

  Args:
    documents: how many have some y.
    x, y: sums over the documents.
    xx, xy, yy: sums of their products over the documents.
  """
  if documents < 2 or not math.isfinite(xx) or y * y < EVEN * yy:
    return None
  ratio = x / y
  # By rounding alone it is below 0, where all documents are alike.
  squares = max(0.0, xx - 2 * ratio * xy + ratio * ratio * yy)
  return student(max(1.0, y * y / yy - 1)) * math.sqrt(documents / (documents - 1) * squares) / y


class Moments:
  """Sums over documents, which come in one by one: however many, they take the same memory."""

  def __init__(self, quantities: int, bins: int):
    self.counts_KN = np.zeros((quantities, bins + 1), np.int64)   # documents that have some of it
    self.sums_KN = np.zeros((quantities, bins + 1))
    self.products_KKN = np.zeros((quantities, quantities, bins + 1))

  def add(self, values_DKN: np.ndarray) -> None:
    """Whole documents: the sums of each over its tokens, by bin."""
    values_DKN = np.concatenate([values_DKN, values_DKN.sum(-1, keepdims=True)], -1)
    self.counts_KN += (values_DKN != 0).sum(0)
    self.sums_KN += values_DKN.sum(0)
    with np.errstate(invalid='ignore', over='ignore'):   # of nats that are not finite
      self.products_KKN += np.einsum('DIN,DJN->IJN', values_DKN, values_DKN)

  def half_widths(self, x: int, y: int) -> list[float | None]:
    """Of the x-th quantity for one of the y-th, a column each."""
    return [half_width(*map(float, one)) for one in zip(
        self.counts_KN[y], self.sums_KN[x], self.sums_KN[y], self.products_KKN[x, x], self.products_KKN[x, y],
        self.products_KKN[y, y])]
