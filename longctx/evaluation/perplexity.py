"""Bits per byte and perplexity of held-out text by context position, in constant memory.

  full     a document is read from its start; one longer than `length` in disjoint windows of
           `length`, each from an empty state. Every window's first tokens have little context.
  sliding  windows of `length` start every `stride` tokens and score only what the window before
           did not reach: beyond the first window every token has length - stride tokens before it.
The position of a token is the number of tokens before it in its window. The value of `full` depends
on `length`, and that of `sliding` on `stride` too: both are part of the result.

Windows are put into the rows of a batch, longest first, and streamed in calls of `segment` tokens
with the state carried; a row that has ended is padding. Live memory is one state and one segment,
whatever the documents' length; on the host also the sums by bin of each document that has several windows, and
with short_context four bytes a token and pass. Where a window fits into one segment no state is made: a causal
model's padding at the end of a row changes nothing before it, and attention without a cache is
faster. Sums are float64 on the host; every target is scored exactly once. Their intervals come of the documents,
see ratio.py.
Held by: tests/test_perplexity.py (a model whose exact answer is known, counts, layouts),
tests/test_perplexity_interval.py.

B batch  T tokens of a segment  D model  V vocab  K quantities  N bins of context position
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import errors, progress
from longctx.evaluation import course, longppl, ratio, result
from longctx.evaluation import windows as windows_lib
from longctx.models import attention_layer
from longctx.parallel import mesh
from longctx.training import metrics
from longctx.training.loss import cross_entropy

MODES = ('full', 'sliding')
SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How held-out text is read and scored."""
  length: int = 0  # tokens of context; 0 = the model's max_length, or whole documents
  segment: int = 512  # tokens a row and call
  batch_size: int = 8  # rows read at once
  stride: int = 0  # tokens from window to window when sliding; 0 = half of length
  modes: tuple[str, ...] = MODES
  short_context: int = 0  # tokens against which key tokens are told, see longppl; 0 = they are not
  short_stride: int = 0  # from window to window of these; 0 = a quarter of short_context
  max_tokens: int = 0  # the first so many tokens of the split; 0 = all
  split: str = 'validation'
  use_ema: bool = False  # the averaged parameters in place of the last; the caller picks them

  def __post_init__(self):
    for name, low in dict(length=0, segment=1, batch_size=1, stride=0, max_tokens=0,
                          short_context=0, short_stride=0).items():
      errors.check_range(f'perplexity.{name}', getattr(self, name), low=low)
    errors.check(not self.length or self.stride <= self.length,
                 f'perplexity.stride={self.stride}: must be at most perplexity.length='
                 f'{self.length}, or tokens between two windows are never scored')
    errors.check(self.short_stride <= self.short_context,
                 f'perplexity.short_stride={self.short_stride}: must be at most '
                 f'perplexity.short_context={self.short_context}')
    errors.check(isinstance(self.modes, tuple) and len(self.modes) > 0,
                 f'perplexity.modes={self.modes!r}: must be a tuple of one or more of '
                 f'{", ".join(MODES)}')
    for mode in self.modes:
      errors.check_choice('perplexity.modes', mode, MODES)
    errors.check_choice('perplexity.split', self.split, SPLITS)


def evaluate(graphdef: nnx.GraphDef, params: Any, documents: Any, tokenizer: Any, config: Config,
             *, layout: mesh.Layout | None = None, loss_chunk: int = 512,
             kept: course.Course | None = None) -> result.Result:
  """Scores `documents`; writes nothing. All processes of a run call it with the same arguments.

  Args:
    graphdef, params: the two halves of `nnx.split(model)`; params placed as `layout` says.
    documents: a `longctx.data.stream.Documents`.
    tokenizer: its `num_bytes(ids)` tells how many bytes of text each id stands for.
    config: how to read them.
    layout: the mesh that cuts the rows; None = one device.
    loss_chunk: tokens whose logits exist at once.
    kept: what tells how far it is, and has what was read before; None: nothing is told or kept.
  """
  length = context_length(config, nnx.merge(graphdef, params))
  stride = (config.stride or max(1, length // 2)) if length else 0
  lengths = np.asarray(documents.lengths, np.int64)
  if lengths.sum() != documents.total_tokens:
    raise AssertionError(f'{lengths.sum()} tokens in documents of {documents.total_tokens}')
  errors.check(len(lengths) > 0, f'perplexity.split={config.split!r}: it holds no document; '
               'choose another split or a larger corpus')
  scored = windows_lib.prefix(lengths, config.max_tokens)
  plans = {'full': windows_lib.cut(scored, length, length or 1),
           'sliding': windows_lib.cut(scored, length, stride or 1)}
  if layout is not None:
    mesh.check_divides('perplexity.batch_size', config.batch_size, 'batch', layout)
    mesh.check_divides('perplexity.segment', config.segment, 'length', layout)
  bytes_V = tokenizer.num_bytes(np.arange(tokenizer.vocab_size))

  jobs = {'full': plans['full'], 'short': longppl.inside(plans['full'], *_short(config))} if config.short_context else {}
  place = {}   # mode -> the pass that has its scores
  for mode in config.modes:
    # Where no document is longer than `length` both passes would read the same windows.
    same = [one for one in jobs if one in plans and all(map(np.array_equal, plans[one], plans[mode]))]
    place[mode] = same[0] if same else mode
    jobs.setdefault(place[mode], plans[mode])
  kept = kept or course.Course()
  kept.begin(sum(windows_lib.num_read(windows) for windows in jobs.values()))

  def read(number: int, name: str, keep: np.ndarray | None) -> result.Pass:
    longest = config.short_context if name == 'short' else length
    shape = (config.batch_size, segment_size(config, longest, layout))
    carries = not longest or longest > shape[1]
    programs = _programs(graphdef, layout, carries, shape[0], longest, loss_chunk,
                         _state_shardings(graphdef, params, layout, shape[0], longest)
                         if layout and carries else None)
    return _run(programs, params, _Reader(documents, bytes_V, shape, scored), jobs[name], keep,
                functools.partial(kept.read, number, where=name), *kept.before(number))

  keeps = np.empty((2, windows_lib.num_read(plans['full'])), np.float32) if config.short_context else (None, None)
  passes = {name: read(number, name, dict(full=keeps[0], short=keeps[1]).get(name))
            for number, name in enumerate(jobs)}
  keys = None
  if config.short_context:
    short, short_stride = _short(config)
    keys = longppl.compare(*keeps, longppl.bins(plans['full']), scored, short=short, stride=short_stride)
  return result.Result(
      split=config.split, documents=int((scored > 0).sum()), length=length, stride=stride,
      passes={mode: passes[place[mode]] for mode in config.modes}, keys=keys,
      peak_memory_bytes=metrics.peak_memory_bytes())


def _short(config: Config) -> tuple[int, int]:
  """Length and stride of the windows that key tokens are told against, within those of `full`."""
  return config.short_context, config.short_stride or max(1, config.short_context // 4)


def context_length(config: Config, model: Any) -> int:
  """Tokens of a window: what the config asks for, within what the model can hold; 0 = unlimited."""
  longest = model.config.max_length
  errors.check(not longest or config.length <= longest,
               f'perplexity.length={config.length}: must be at most model.max_length={longest}')
  errors.check(config.length or longest or not model.state_grows,
               'perplexity.length=0: must be given, at least 1; this model has no max_length and '
               'its state grows with every token')
  length = config.length or longest
  errors.check(not length or config.short_context < length,
               f'perplexity.short_context={config.short_context}: must be less than the evaluated '
               f'length, {length} tokens, with which it is compared')
  return length


def segment_size(config: Config, length: int, layout: mesh.Layout | None) -> int:
  """Tokens a row and call: no more than a window needs, in equal parts for the mesh."""
  parts = layout.size('length') if layout else 1
  return min(config.segment, -(-length // parts) * parts) if length else config.segment


class _Programs(NamedTuple):
  fresh: Any  # params -> state, or None where windows are read in one call
  score: Any  # params, state, tokens, targets, valid -> nll [B, T], state
  put: Any  # host array [B, T] of all rows -> array


def _state_shardings(graphdef, params, layout, batch_size, capacity) -> Any:
  fresh = lambda params: nnx.merge(graphdef, params).init_state(batch_size, capacity=capacity)
  return attention_layer.shardings(layout, jax.eval_shape(mesh.under(layout, fresh), params))


@functools.lru_cache(maxsize=4)
def _programs(graphdef, layout, carries, batch_size, capacity, loss_chunk, state) -> _Programs:
  """The compiled parts, shared by all evaluations of one run: compiled once.

  `state`: the shardings of the model's state.
  """
  wrap = functools.partial(mesh.under, layout) if layout else lambda function: function
  whole = layout.sharding() if layout else None
  shards = dict(batch_shards=layout.size('batch'), length_shards=layout.size('length')
                ) if layout else {}

  def fresh(params):
    return nnx.merge(graphdef, params).init_state(batch_size, capacity=capacity)

  def score(params, state, tokens_BT, targets_BT, valid_BT):
    model = nnx.merge(graphdef, params)
    hidden_BTD, state = model(tokens_BT, state, valid_BT=valid_BT if carries else None)
    _, nll_BT = cross_entropy(hidden_BTD, model.output_embedding_VD(), targets_BT,
                              valid_BT.astype(jnp.float32), chunk=loss_chunk, **shards)
    return nll_BT, state

  def put(host_BT):
    if layout is None:
      return host_BT
    return jax.make_array_from_callback(
        host_BT.shape, layout.sharding('batch', 'length'), lambda index: host_BT[index])

  # The state keeps one placement, so that the second call finds the first one's program; the nll
  # is whole on every device, so that every process can fetch it.
  return _Programs(jax.jit(wrap(fresh), out_shardings=state) if carries else lambda params: None,
                   jax.jit(wrap(score), donate_argnums=1,
                           out_shardings=(whole, state) if layout else None), put)


class _Segment(NamedTuple):
  """The host's side of one call: what goes in, and where the scores of it belong."""
  first: bool  # of its batch of windows: the state starts empty
  document_B: np.ndarray  # that each row is of; fewer than B where the windows end
  tokens_BT: np.ndarray
  targets_BT: np.ndarray
  valid_BT: np.ndarray
  scored_BT: np.ndarray
  bin_BT: np.ndarray
  index_BT: np.ndarray  # of the token among all that are scored


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Turns windows into segments of a fixed shape."""
  documents: Any
  bytes_V: np.ndarray
  shape: tuple[int, int]  # of a segment: rows, tokens
  scored: np.ndarray  # how many tokens of each document are

  def segments(self, windows: windows_lib.Windows, first: int) -> Iterator[_Segment]:
    """Of all batches from the `first` on; the longest windows come first."""
    batch, size = self.shape
    held = {}
    before = np.cumsum(self.scored) - self.scored
    for i in range(first * batch, len(windows.start), batch):
      rows = [windows_lib.Windows(*one) for one in zip(*(x[i:i + batch] for x in windows))]
      held = {d: held[d] if d in held else self.documents.document(d)
              for d in {int(one.document) for one in rows}}
      for offset in range(0, rows[0].stop - rows[0].start, size):
        yield self._segment(rows, held, before, offset)

  def _segment(self, rows: list[windows_lib.Windows], held: dict[int, np.ndarray],
               before: np.ndarray, offset: int) -> _Segment:
    shape = self.shape
    tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    valid_BT, scored_BT = np.zeros(shape, bool), np.zeros(shape, bool)
    index_BT = np.zeros(shape, np.int64)
    for row, one in enumerate(rows):
      low, high = one.start + offset, min(one.start + offset + shape[1], one.stop)
      if low >= high:
        continue
      document = held[int(one.document)]
      part = document[low:high + 1]
      if len(part) == high - low:  # the document ends here: a separator follows it
        part = np.append(part, document[0])
      tokens_BT[row, :high - low], targets_BT[row, :high - low] = part[:-1], part[1:]
      valid_BT[row, :high - low] = True
      scored_BT[row, max(one.scored - low, 0):high - low] = True
      index_BT[row, :high - low] = before[int(one.document)] + np.arange(low, high)
    bin_T = windows_lib.position_bin(offset + np.arange(shape[1]))
    return _Segment(offset == 0, np.array([int(one.document) for one in rows]), tokens_BT, targets_BT, valid_BT, scored_BT,
                    np.broadcast_to(bin_T, shape), index_BT)


NATS, TOKENS, BYTES, NOT_FINITE = range(4)   # what is summed


class _Sums:
  """Sums by bin, in float64, of one pass: of a batch's rows, of documents read in part, of whole documents.

  Args:
    windows: of the pass, in the order in which they are read.
    rows: of a batch.
    bins: of context position.
    keep: what each token's nats are written to.
  """

  def __init__(self, windows: windows_lib.Windows, rows: int, bins: int, keep: np.ndarray | None = None):
    self.keep = keep
    self.rows_BKN = np.zeros((rows, 4, bins))
    self.left = np.bincount(windows.document)   # windows of each document that are not read yet
    several = self.left > 1
    self.place = np.where(several, np.cumsum(several) - 1, -1)   # of a document in `parts`
    self.parts = np.zeros((int(several.sum()), 4, bins))
    self.whole = ratio.Moments(4, bins)

  def add(self, segment: _Segment, nll_BT: np.ndarray, bytes_V: np.ndarray) -> None:
    where = segment.scored_BT
    nll, bins = nll_BT[where].astype(np.float64), self.rows_BKN.shape[2]
    index = np.nonzero(where)[0] * bins + segment.bin_BT[where]
    for quantity, weights in ((NATS, nll), (TOKENS, None), (BYTES, bytes_V[segment.targets_BT[where]]),
                              (NOT_FINITE, ~np.isfinite(nll))):
      self.rows_BKN[:, quantity] += np.bincount(index, weights, len(where) * bins).reshape(-1, bins)
    if self.keep is not None:
      self.keep[segment.index_BT[where]] = nll

  def end_batch(self, document_B: np.ndarray) -> None:
    """A batch of windows of these documents is read."""
    ended = []
    for document, row_KN in zip(document_B, self.rows_BKN):
      place = self.place[document]
      if place >= 0:
        self.parts[place] += row_KN
        row_KN = self.parts[place]
      self.left[document] -= 1
      if not self.left[document]:
        ended.append(row_KN)
    if ended:
      self.whole.add(np.stack(ended))
    self.rows_BKN[:] = 0

  def arrays(self) -> course.Arrays:
    """All that must be kept between two batches."""
    return dict(counts=self.whole.counts_KN, sums=self.whole.sums_KN, products=self.whole.products_KKN,
                parts=self.parts, left=self.left, **({} if self.keep is None else dict(keep=self.keep)))

  def carry_on(self, before: course.Arrays) -> None:
    """From `arrays()` of before."""
    for name, array in self.arrays().items():
      array[:] = before[name]

  def scores(self) -> tuple[result.Score, ...]:
    """A bin each, and of all bins."""
    whole = self.whole
    return tuple(
        result.Score(float(sums[NATS]), *(int(sums[i]) for i in (TOKENS, BYTES, NOT_FINITE)), int(documents), *half)
        for sums, documents, *half in zip(whole.sums_KN.T, whole.counts_KN[TOKENS], whole.half_widths(NATS, BYTES),
                                          whole.half_widths(NATS, TOKENS)))


def _run(programs: _Programs, params: Any, reader: _Reader, windows: windows_lib.Windows, keep: np.ndarray | None,
         tell: Callable[..., None], batches: int, before: course.Arrays) -> result.Pass:
  """Reads all windows, a segment at a time; the last one's scores are fetched while the next runs.

  tell(batches=, count=, ...) hears of each batch of windows that is read; so many `batches` were read `before`.
  """
  windows, took = windows_lib.longest_first(windows), 0.0
  longest = windows.stop[0] - windows.start[0]
  sums = _Sums(windows, reader.shape[0], 1 + int(windows_lib.position_bin(longest - 1)), keep)
  if batches:
    sums.carry_on(before)
    took = float(before['seconds'])
  put, none = programs.put, np.zeros(reader.shape, np.int32)
  # A call on padding alone compiles, so that the clock measures reading.
  nll_BT, state = programs.score(params, programs.fresh(params), put(none), put(none),
                                 put(none > 0))
  jax.block_until_ready(nll_BT)
  start, waiting, tokens = time.perf_counter(), None, 0

  def add(ends: bool) -> None:
    """The scores of the segment that waits; `ends`: the last of its batch."""
    nonlocal batches, tokens
    segment, nll_BT = waiting
    sums.add(segment, np.asarray(nll_BT), reader.bytes_V)
    tokens += int(segment.valid_BT.sum())
    progress.moved()
    if ends:
      sums.end_batch(segment.document_B)
      batches, count, tokens = batches + 1, tokens, 0
      tell(batches=batches, count=count, seconds=took + time.perf_counter() - start, **sums.arrays())

  for segment in reader.segments(windows, batches):
    if segment.first:
      state = programs.fresh(params)
    nll_BT, state = programs.score(params, state, put(segment.tokens_BT), put(segment.targets_BT),
                                   put(segment.valid_BT))
    if waiting is not None:
      add(ends=segment.first)
    waiting = segment, nll_BT
  if waiting is not None:
    add(ends=True)
  seconds = took + time.perf_counter() - start
  *bins, total = sums.scores()
  if total.tokens != reader.scored.sum():
    raise AssertionError(f'{total.tokens} tokens were scored of {reader.scored.sum()}')
  tokens_read = windows_lib.num_read(windows)
  return result.Pass(total, tuple(bins), len(windows.start), tokens_read, seconds, tokens_read / seconds)
