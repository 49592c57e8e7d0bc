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
compared without their number. The intervals of LongPPL and of the gain come of the documents, see ratio.py.
Held by: tests/test_longppl.py, tests/test_perplexity_interval.py.

D documents  K quantities  N bins of context position
"""

import dataclasses
import math
from typing import Any

import numpy as np

from longctx.evaluation import ratio
from longctx.evaluation import windows as windows_lib

ALPHA, BETA = 2.0, 2.0   # nats
CHUNK = 1 << 18          # tokens compared at once, in float64


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
  documents: np.ndarray  # that have a token in the bin
  gain_half: np.ndarray  # half of the 95 % interval of the gain, nats a token; nan: too few documents
  all_gain_half: float   # of the gain of all bins together
  key_documents: int     # that have a key token
  key_half: float        # half of the interval of nats a key token; nan: too few documents

  @property
  def share(self) -> float:
    """Of the tokens, how many are key."""
    return float(self.keys.sum() / self.tokens.sum())

  @property
  def perplexity(self) -> float:
    """LongPPL; nan where no token is key."""
    count = int(self.keys.sum())
    return math.exp(self.key_nats / count) if count else math.nan

  @property
  def interval(self) -> tuple[float, float]:
    """Ends of LongPPL's 95 % interval; nan: too few documents."""
    if math.isnan(self.key_half):
      return math.nan, math.nan
    loss = math.log(self.perplexity)   # within: no token has less than 0 nats, no key one BETA
    return math.exp(max(0.0, loss - self.key_half)), math.exp(min(BETA, loss + self.key_half))

  def mean_gain(self) -> np.ndarray:
    """Nats a token, by bin; nan where a bin has none."""
    return np.divide(self.gain, self.tokens, out=np.full(len(self.gain), np.nan),
                     where=self.tokens > 0)

  def to_json(self) -> dict[str, Any]:
    plain = lambda x: float(x) if math.isfinite(x) else None
    around = lambda x, half: dict(gain=plain(x), gain_low=plain(x - half), gain_high=plain(x + half))
    rows = [dict(zip(('first', 'last'), windows_lib.bin_edges(i)), tokens=int(tokens), documents=int(documents),
                 keys=int(keys), **around(gain, half))
            for i, (tokens, documents, keys, gain, half) in enumerate(
                zip(self.tokens, self.documents, self.keys, self.mean_gain(), self.gain_half))]
    low, high = self.interval
    return dict(short_context=self.short, stride=self.stride, alpha=ALPHA, beta=BETA,
                tokens=int(self.tokens.sum()), keys=int(self.keys.sum()), share=self.share,
                key_documents=self.key_documents, perplexity=plain(self.perplexity), perplexity_low=plain(low),
                perplexity_high=plain(high), **around(self.all_gain, self.all_gain_half), positions=rows)

  @property
  def all_gain(self) -> float:
    """Nats a token, of all bins."""
    return float(self.gain.sum() / self.tokens.sum())

  def table(self) -> str:
    """Lines of text: key tokens and gain, a line a bin; +-95 %: half of the gain's interval."""
    low, high = self.interval
    between = 'no interval' if math.isnan(low) else f'{low:,.3f} to {high:,.3f} with 95 % confidence'
    lines = [f'against the last {self.short - self.stride:,} to {self.short:,} tokens alone: '
             f'{int(self.keys.sum()):,} key tokens ({self.share:.2%}), LongPPL '
             + (f'{self.perplexity:,.3f} ({between})' if self.keys.sum() else '- (none)'),
             f'{"position":<17}{"tokens":>11}{"key":>10}{"gain, nats":>12}{"+-95 %":>10}']
    line = lambda label, tokens, keys, gain, half: (
        f'{label:<17}{int(tokens):>11,}{int(keys):>10,}{gain:>12.4f}' +
        f'{"-" if math.isnan(half) else f"{half:.4f}":>10}')
    for i, row in enumerate(zip(self.tokens, self.keys, self.mean_gain(), self.gain_half)):
      low, high = windows_lib.bin_edges(i)
      lines.append(line(f'{low:,}' if low == high else f'{low:,}-{high:,}', *row))
    return '\n'.join([*lines, line('all', self.tokens.sum(), self.keys.sum(), self.all_gain, self.all_gain_half)])


GAIN, TOKENS, KEYS, KEY_NATS = range(4)   # what is summed


def compare(full_nll: np.ndarray, short_nll: np.ndarray, bin_of: np.ndarray, sizes: np.ndarray, *, short: int,
            stride: int) -> Keys:
  """The two scores of each token, put together.

  Args:
    full_nll, short_nll, bin_of: of each token, document after document.
    sizes: of the documents, in tokens.
    short, stride: of the windows that gave short_nll.
  """
  bins, ends = int(bin_of.max()) + 1, np.cumsum(sizes)
  sums, rest_KN = ratio.Moments(4, bins), np.zeros((4, bins))   # the rest: of the document that a piece cuts
  for i in range(0, len(bin_of), CHUNK):
    full, bin_ = full_nll[i:i + CHUNK].astype(np.float64), bin_of[i:i + CHUNK]
    gain = short_nll[i:i + CHUNK] - full
    key = (gain > ALPHA) & (full < BETA)
    document = np.searchsorted(ends, np.arange(i, i + len(full)), side='right')
    first, last = document[0], document[-1]
    values_DKN = np.stack([
        np.bincount((document - first) * bins + bin_, weights, (1 + last - first) * bins).reshape(-1, bins)
        for weights in (gain, None, key, np.where(key, full, 0))], axis=1)
    values_DKN[0] += rest_KN
    ended = last - first + (ends[last] == i + len(full))
    sums.add(values_DKN[:ended])
    rest_KN = values_DKN[ended:].sum(0)
  half = lambda x, y: np.array(sums.half_widths(x, y), np.float64)   # None: nan
  *gain_half, all_gain_half = half(GAIN, TOKENS)
  of_bins = sums.sums_KN[:, :-1]
  return Keys(short=short, stride=stride, tokens=of_bins[TOKENS].astype(np.int64), keys=of_bins[KEYS].astype(np.int64),
              gain=of_bins[GAIN], key_nats=float(sums.sums_KN[KEY_NATS, -1]), documents=sums.counts_KN[TOKENS, :-1],
              gain_half=np.array(gain_half), all_gain_half=float(all_gain_half),
              key_documents=int(sums.counts_KN[KEYS, -1]), key_half=float(half(KEY_NATS, KEYS)[-1]))
