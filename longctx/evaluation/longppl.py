"""Which tokens a long context helps to foretell, and how well: LongPPL of the model itself.

Every token is scored twice: with all that stands before it in its window, and with the last `short`
tokens of that alone (windows inside the window, every `stride`; a token has short - stride or more
tokens before it).

    gain      nll_short - nll_full
    key       gain > ALPHA and nll_full < BETA
    LongPPL   exp(mean nll_full of the key tokens)

Source: Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language Modeling?",
arXiv:2410.23771 (alpha = 2, beta = -2 for log-probabilities; 4,096 tokens, every 1,024). Differs:
the paper lets a larger model say which tokens are key; here each model says so itself. So a model
with fewer keys makes less use of its context, and perplexities over different keys are not to be
compared without their number.
Held by: tests/test_longppl.py.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from longctx.evaluation import windows as windows_lib

ALPHA, BETA = 2.0, 2.0   # nats
CHUNK = 1 << 20          # tokens compared at once, in float64


def inside(full: windows_lib.Windows, short: int, stride: int) -> windows_lib.Windows:
  """The windows of `short` tokens that score the tokens of each of the `full` ones once more."""
  number, start, scored, stop = windows_lib.cut(full.stop - full.start, short, stride)
  base = full.start[number]
  return windows_lib.Windows(full.document[number], base + start, base + scored, base + stop)


def bins(full: windows_lib.Windows) -> np.ndarray:
  """The bin of context position of each token that disjoint windows score, in their order; int8."""
  sizes = full.stop - full.start
  by_position = windows_lib.position_bin(np.arange(sizes.max())).astype(np.int8)
  return np.concatenate([by_position[:size] for size in sizes])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
  """What a long context gains; each array has an entry a bin of context position in the window."""

  short: int
  stride: int
  tokens: np.ndarray
  keys: np.ndarray       # how many of them are key
  gain: np.ndarray       # nats by which the full context foretells the bin's tokens better, summed
  key_nats: float        # of all key tokens, with the full context

  @property
  def share(self) -> float:
    """Of the tokens, how many are key."""
    return float(self.keys.sum() / self.tokens.sum())

  @property
  def perplexity(self) -> float:
    """LongPPL; nan where no token is key."""
    count = int(self.keys.sum())
    return math.exp(self.key_nats / count) if count else math.nan

  def mean_gain(self) -> np.ndarray:
    """Nats a token, by bin; nan where a bin has none."""
    return np.divide(self.gain, self.tokens, out=np.full(len(self.gain), np.nan),
                     where=self.tokens > 0)

  def to_json(self) -> dict[str, Any]:
    plain = lambda x: float(x) if math.isfinite(x) else None
    rows = [dict(zip(('first', 'last'), windows_lib.bin_edges(i)), tokens=int(tokens),
                 keys=int(keys), gain=plain(gain))
            for i, (tokens, keys, gain) in enumerate(zip(self.tokens, self.keys, self.mean_gain()))]
    return dict(short_context=self.short, stride=self.stride, alpha=ALPHA, beta=BETA,
                tokens=int(self.tokens.sum()), keys=int(self.keys.sum()), share=self.share,
                perplexity=plain(self.perplexity), gain=plain(self.gain.sum() / self.tokens.sum()),
                positions=rows)

  def table(self) -> str:
    """Lines of text: key tokens and gain, a line a bin."""
    lines = [f'against the last {self.short - self.stride:,} to {self.short:,} tokens alone: '
             f'{int(self.keys.sum()):,} key tokens ({self.share:.2%}), LongPPL '
             + (f'{self.perplexity:,.3f}' if self.keys.sum() else '- (none)'),
             f'{"position":<17}{"tokens":>11}{"key":>10}{"gain, nats":>12}']
    for i, (tokens, keys, gain) in enumerate(zip(self.tokens, self.keys, self.mean_gain())):
      low, high = windows_lib.bin_edges(i)
      label = f'{low:,}' if low == high else f'{low:,}-{high:,}'
      lines.append(f'{label:<17}{int(tokens):>11,}{int(keys):>10,}{gain:>12.4f}')
    return '\n'.join(lines)


def compare(full_nll: np.ndarray, short_nll: np.ndarray, bin_of: np.ndarray, *, short: int,
            stride: int) -> Keys:
  """The two scores of each token, put together; arrays of one order and length."""
  count, key_nats = int(bin_of.max()) + 1, 0.0
  tokens, keys, gains = np.zeros((3, count))
  for i in range(0, len(bin_of), CHUNK):
    full, bin_ = full_nll[i:i + CHUNK].astype(np.float64), bin_of[i:i + CHUNK]
    gain = short_nll[i:i + CHUNK] - full
    key = (gain > ALPHA) & (full < BETA)
    for sums, weights in ((tokens, None), (keys, key), (gains, gain)):
      sums += np.bincount(bin_, weights=weights, minlength=count)
    key_nats += float(full[key].sum())
  return Keys(short=short, stride=stride, tokens=tokens.astype(np.int64),
              keys=keys.astype(np.int64), gain=gains, key_nats=key_nats)
