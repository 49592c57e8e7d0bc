"""What the literature predicts of the arena, each as a rule that the scores are asked.

A rule says seen, not seen or not run, and the numbers that it used. `Above` means by more than two
standard errors of the difference; `at chance`, no further above it than two of its standard errors or
0.02. The rows of books are the same for all models, so that most of their spread cancels: a margin in bits
stands for it.
Held by: tests/test_arena.py.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import roster

# The commonest of the values that were written last: drawn 100,000 times. A passkey's digits differ.
CHANCE = dict(mqar=1 / 8, rewrite_8=0.258, rewrite_16=0.192, parity_64=0.5, parity_256=0.5,
              passkey_1=0.112, passkey_16=0.112, passkey_64=0.112)
NEAR, BITS = 0.02, 0.02   # of an accuracy to chance; of bits per byte to each other


class Score(NamedTuple):
  mean: float
  error: float   # standard
  rates: int     # of the grid that were run

  def __str__(self):
    return f'{self.mean:.3f}±{self.error:.3f}'


Scores = dict[str, dict[str, Score]]   # model -> field -> score


class Verdict(NamedTuple):
  mark: str      # seen | not seen | not run
  numbers: str


def verdict(seen: bool, numbers: str) -> Verdict:
  return Verdict('seen' if seen else 'not seen', numbers)


def missing(scores: Scores, models: Iterable[str], *fields: str) -> Verdict | None:
  lacking = [model for model in models if any(field not in scores.get(model, {}) for field in fields)]
  return Verdict('not run', f'no {fields[-1]} of {", ".join(lacking)}') if lacking else None


def worth(score: Score) -> float:
  return score.mean if math.isfinite(score.mean) else -math.inf   # of an accuracy


def above(scores: Scores, field: str, high: tuple[str, ...], low: tuple[str, ...]) -> Verdict:
  """Whether the last of `high` is above the first of `low`."""
  if none := missing(scores, (*high, *low), field):
    return none
  last = min(high, key=lambda model: worth(scores[model][field]))
  first = max(low, key=lambda model: worth(scores[model][field]))
  a, b = scores[last][field], scores[first][field]
  return verdict(worth(a) - worth(b) > 2 * math.hypot(a.error, b.error),
                 f'lowest of the former {last} {a}, highest of the latter {first} {b}')


def excess(score: Score, field: str) -> float:
  return worth(score) - CHANCE[field]


def near_chance(score: Score, field: str) -> bool:
  return not excess(score, field) > max(NEAR, 2 * score.error)


def at_chance(scores: Scores, field: str, models: tuple[str, ...]) -> Verdict:
  if none := missing(scores, models, field):
    return none
  far = [m for m in models if not near_chance(scores[m][field], field)]
  said = far or [max(models, key=lambda m: excess(scores[m][field], field))]
  return verdict(not far, f'chance {CHANCE[field]:.3f}, {"above it" if far else "highest"} '
                 + ', '.join(f'{m} {scores[m][field]}' for m in said))


def keeps(scores: Scores, models: tuple[str, ...], near: str, far: str, half: bool) -> Verdict:
  """Whether each model that has learned `near` keeps at least half of what it is above chance at `far`;
  or, not `half`, whether each keeps less. One that has not learned it shows neither."""
  if none := missing(scores, models, near, far):
    return none
  learned = [m for m in models if not near_chance(scores[m][near], near)]
  part = lambda m: excess(scores[m][far], far) / excess(scores[m][near], near)
  return verdict(len(learned) == len(models) and all((part(m) >= 0.5) == half for m in models),
                 ', '.join(f'{m} {scores[m][near]} to {scores[m][far]}{"" if m in learned else " (not learned)"}'
                           for m in models))


def at_or_below_in_bits(scores: Scores, models: tuple[str, ...], other: str) -> Verdict:
  if none := missing(scores, (*models, other), 'books'):
    return none
  bits = lambda model: -worth(scores[model]['books']._replace(mean=-scores[model]['books'].mean))
  over = [m for m in models if not bits(m) <= bits(other) + BITS]
  said = over or [max(models, key=bits)]
  return verdict(not over, f'{other} {scores[other]["books"]}, {"above it" if over else "highest"} '
                 + ', '.join(f'{m} {scores[m]["books"]}' for m in said))


def grows_most(scores: Scores, model: str, others: tuple[str, ...]) -> Verdict:
  """Whether beyond the trained length the bits of `model` grow more than those of each other."""
  if none := missing(scores, (model, *others), 'books', 'books_far'):
    return none
  growth = lambda m: scores[m]['books_far'].mean - scores[m]['books'].mean
  most = max(others, key=lambda m: growth(m) if math.isfinite(growth(m)) else math.inf)
  return verdict(growth(model) > growth(most) + BITS,
                 f'{model} {growth(model):+.3f} bits, most of the others {most} {growth(most):+.3f}')


DELTA = ('delta_net', 'gated_delta', 'kda', 'rwkv7')
GATED = ('gated_delta', 'gla', 'kda', 'mamba2', 'mlstm', 'rwkv7')   # matrix states
CELLS = ('lstm', 'slstm', 'gru')
# Of memories, ttt and titans_memory have no attention within their segments.
ON_ATTENTION = (*roster.ATTENTION, *(m for m in roster.MEMORIES if m not in ('ttt', 'titans_memory')))
NOT_ATTENTION = tuple(m for m in roster.NAMES if m not in roster.ATTENTION)


class Prediction(NamedTuple):
  name: str
  says: str     # as in README.md
  rule: Callable[[Scores], Verdict]


PREDICTIONS = (
    Prediction('1', 'MQAR: attention, the delta rules and Mamba-2 above LSTM, GRU, linear attention and the '
               'element-wise recurrences',
               lambda s: above(s, 'mqar', ('attention', *DELTA, 'mamba2'),
                               ('lstm', 'gru', 'linear_attention', 'min_gru', 'min_lstm', 'rglru'))),
    Prediction('2', 'Rewrite of 8 keys: what corrects (delta rules, ARMT, Infini by the delta rule) above '
               'sums (linear attention, Infini linear)',
               lambda s: above(s, 'rewrite_8', (*DELTA, 'armt', 'infini'),
                               ('linear_attention', 'infini_linear'))),
    Prediction('3a', 'Parity of 65 to 256 bits: LSTM, sLSTM, GRU and the gated delta rule with eigenvalues '
               'below 0 above attention and every memory built on it',
               lambda s: above(s, 'parity_256', (*CELLS, 'gated_delta (0,2)'), ON_ATTENTION)),
    Prediction('3b', 'Parity of 65 to 256 bits: attention and every memory built on it at chance',
               lambda s: at_chance(s, 'parity_256', ON_ATTENTION)),
    Prediction('4a', 'Passkey at 64 times the length: the window and Transformer-XL at chance',
               lambda s: at_chance(s, 'passkey_64', ('window', 'transformer_xl'))),
    Prediction('4b', 'Passkey at 64 times the length: attention, at positions it has not met, keeps less '
               'than half of what it is above chance',
               lambda s: keeps(s, ('attention',), 'passkey_1', 'passkey_64', half=False)),
    Prediction('4c', 'Passkey at 16 times the length: gated and delta memories keep at least half of what '
               'they are above chance',
               lambda s: keeps(s, (*GATED, 'delta_net', 'infini'), 'passkey_1', 'passkey_16', half=True)),
    Prediction('5a', 'Books: gated matrix states at or below the bits of attention',
               lambda s: at_or_below_in_bits(s, GATED, 'attention')),
    Prediction('5b', 'Books beyond 512 bytes: the bits of attention grow more than those of any recurrence '
               'or memory',
               lambda s: grows_most(s, 'attention', NOT_ATTENTION)),
)
