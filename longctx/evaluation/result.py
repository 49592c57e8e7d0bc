"""What an evaluation found, as numbers, as JSON and as a table.

Sums are kept (nats, tokens, bytes) and ratios are made from them:
  bits per byte  = nats / ln 2 / bytes of the targets     comparable between tokenizers
  perplexity     = exp(nats / tokens)                     per token of this tokenizer
A separator has no bytes, but to predict where a document ends costs bits: its nats count. So a bin
may hold tokens and no bytes, and its bits per byte are then not defined ('-').
A sliding pass reaches the first positions of a window at the starts of documents alone: a bin of it
with less than FEW of its tokens is neither printed nor drawn, for it tells of those starts.
Each of them has a 95 % interval, with documents as what was drawn, see ratio.py: its ends are in JSON, half of that
of bits per byte in the table. With too few documents it is not defined.
A token whose nats are not finite makes the sums of its bin and the total not finite; they are
counted, printed as nan or inf, and null in JSON.
Held by: tests/test_perplexity.py, tests/test_perplexity_interval.py.
"""

import dataclasses
import math
from typing import Any

from longctx.evaluation import longppl, windows

FEW = 0.01   # of a pass's tokens


@dataclasses.dataclass(frozen=True)
class Score:
  """Sums over scored tokens."""
  nats: float
  tokens: int
  bytes: int
  not_finite: int = 0
  documents: int = 0   # that have one of the tokens
  byte_half: float | None = None   # half of the 95 % interval of nats per byte; None: too few documents
  token_half: float | None = None  # and of nats per token

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.nats / self.tokens if self.tokens else math.nan

  @property
  def perplexity(self) -> float:
    return _exp(self.loss)

  @property
  def bits_half(self) -> float:
    """Half of the interval of bits per byte; nan: too few documents."""
    return math.nan if self.byte_half is None else self.byte_half / math.log(2)

  def to_json(self) -> dict[str, Any]:
    bits, loss, half = self.bits_per_byte, self.loss, math.nan if self.token_half is None else self.token_half
    low, high = _down(loss, half), loss + half
    ratios = dict(bits_per_byte=bits, bits_per_byte_low=_down(bits, self.bits_half),
                  bits_per_byte_high=bits + self.bits_half,
                  perplexity=self.perplexity, perplexity_low=_exp(low), perplexity_high=_exp(high),
                  loss=loss, loss_low=low, loss_high=high)
    return dict(tokens=self.tokens, bytes=self.bytes, documents=self.documents, not_finite=self.not_finite,
                **{name: _finite(x) for name, x in ratios.items()})


@dataclasses.dataclass(frozen=True)
class Pass:
  """One way of reading the split. `bins[i]` holds the positions windows.bin_edges(i)."""
  total: Score
  bins: tuple[Score, ...]
  windows: int
  tokens_read: int  # with those read again for context
  seconds: float
  tokens_per_second: float

  def few(self) -> set[int]:
    """The bins that hold some of the tokens, but less than FEW."""
    return {i for i, score in enumerate(self.bins) if 0 < score.tokens < FEW * self.total.tokens}

  def to_json(self, few: set[int] = frozenset()) -> dict[str, Any]:
    rows = [dict(zip(('first', 'last'), windows.bin_edges(i)), **score.to_json(), few=i in few)
            for i, score in enumerate(self.bins)]
    return dict(self.total.to_json(), windows=self.windows, tokens_read=self.tokens_read,
                seconds=self.seconds, tokens_per_second=self.tokens_per_second, positions=rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """All passes over one split."""
  split: str
  documents: int
  length: int  # tokens of context; 0 = whole documents
  stride: int  # of the sliding pass; 0 where windows are whole documents
  passes: dict[str, Pass]
  peak_memory_bytes: int
  keys: longppl.Keys | None = None  # with short_context

  @property
  def first(self) -> Pass:
    """The pass whose total is quoted where one number is wanted: 'full' where it ran."""
    return self.passes.get('full') or next(iter(self.passes.values()))

  @property
  def bits_per_byte(self) -> float:
    return self.first.total.bits_per_byte

  @property
  def loss(self) -> float:
    return self.first.total.loss

  def to_json(self) -> dict[str, Any]:
    """Plain values that `json.dumps(..., allow_nan=False)` takes."""
    return dict(
        split=self.split, documents=self.documents, length=self.length, stride=self.stride,
        bits_per_byte=_finite(self.bits_per_byte), loss=_finite(self.loss),
        tokens_per_second=self.first.tokens_per_second,
        peak_memory_bytes=self.peak_memory_bytes,
        modes={mode: one.to_json(self.few(mode)) for mode, one in self.passes.items()},
        **({'key_tokens': self.keys.to_json()} if self.keys else {}))

  def scalars(self) -> dict[str, float]:
    """For metrics.jsonl."""
    total = self.first.total
    return dict(validation_loss=total.loss, validation_bits_per_byte=total.bits_per_byte,
                validation_perplexity=total.perplexity)

  def line(self) -> str:
    total = self.first.total
    return (f'{total.bits_per_byte:.4f} bits per byte, {total.loss:.4f} nats per token, over '
            f'{total.tokens:,} tokens')

  def few(self, mode: str) -> set[int]:
    """Bins of a pass that tell of the starts of documents alone."""
    slides = mode == 'sliding' and self.passes[mode] is not self.passes.get('full')
    return self.passes[mode].few() if slides else set()

  def table(self) -> str:
    """Loss by context position, a line a bin, the passes side by side; lines of text."""
    total = self.first.total
    context = f'context {self.length:,} tokens' if self.length else 'context: the whole document'
    lines = [f'{self.split}: {total.tokens:,} tokens, {total.bytes:,} bytes, '
             f'{self.documents:,} documents; {context}']
    same = self.passes.get('full') is self.passes.get('sliding')
    titles = {'full': 'full: disjoint windows' if self.length else 'full',
              'sliding': 'sliding: the same windows' if same else f'sliding by {self.stride:,}'}
    width, cell = 17, 42
    lines.append(' ' * width + ''.join(f'{titles[mode]:>{cell}}' for mode in self.passes))
    lines.append(f'{"position":<{width}}' +
                 f'{"tokens":>11}{"bits/byte":>10}{"+-95 %":>9}{"perplexity":>12}' * len(self.passes))
    for i in range(max(len(one.bins) for one in self.passes.values())):
      low, high = windows.bin_edges(i)
      label = f'{low:,}' if low == high else f'{low:,}-{high:,}'
      lines.append(f'{label:<{width}}' + ''.join(
          _cells(one.bins[i] if i < len(one.bins) else Score(0, 0, 0), i in self.few(mode))
          for mode, one in self.passes.items()))
    lines.append(f'{"all":<{width}}' +
                 ''.join(_cells(one.total) for one in self.passes.values()))
    lines.append(f'{"tokens/s":<{width}}' + ''.join(
        f'{one.tokens_per_second:>11,.0f}{"":>31}' for one in self.passes.values()).rstrip())
    if self.peak_memory_bytes:
      lines.append(f'{"peak memory":<{width}}{self.peak_memory_bytes / 2**20:>7,.0f} MiB')
    lines.append('+-95 %: half of the 95 % interval of bits/byte, had other documents been drawn; '
                 '-: too few documents to tell')
    if any(map(self.few, self.passes)):
      lines.append(f'of bins with under {FEW:.0%} of the tokens of sliding, which are starts of '
                   'documents, the count alone is told')
    broken = max(one.total.not_finite for one in self.passes.values())
    if broken:
      lines.append(f'{broken:,} tokens have a loss that is not finite: the parameters hold NaN or '
                   'inf, or the model overflows')
    if self.keys:
      lines.append(self.keys.table())
    return '\n'.join(lines)


def _down(x: float, half: float) -> float:
  """The lower end of what is never below 0; nan stays nan."""
  return 0.0 if x < half else x - half


def _exp(loss: float) -> float:
  return math.exp(loss) if not loss > 700 else math.inf  # 700: float64 ends


def _finite(x: float) -> float | None:
  return float(x) if math.isfinite(x) else None


def _cells(score: Score, few: bool = False) -> str:
  if not score.tokens or few:
    return f'{f"{score.tokens:,}" if few else "-":>11}{"-":>10}{"-":>9}{"-":>12}'
  bits = f'{score.bits_per_byte:.4f}' if score.bytes else '-'
  half = f'{score.bits_half:.4f}' if math.isfinite(score.bits_half) else '-'
  perplexity = f'{score.perplexity:,.3f}' if score.perplexity < 1e6 else f'{score.perplexity:.2e}'
  return f'{score.tokens:>11,}{bits:>10}{half:>9}{perplexity:>12}'
