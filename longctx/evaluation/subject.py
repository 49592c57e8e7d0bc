"""What a task sees of a model: tokens written after prompts, and how likely given tokens are.

    generate(prompts, max_new_tokens, stops) -> for each prompt the tokens written after it
    score(rows)                              -> of each row's tokens but the first: log p, and whether greedy

Rows are sorted by length, put into batches of one shape and streamed through the model in calls of `segment`
tokens, the state carried: live memory is one state and one segment, whatever the length, where the model's
state is constant. A state that grows gets room in few sizes, so that few programs are compiled. Answers come
in the order of the request. Over a mesh `data` cuts the rows and `seq` the tokens; all processes of a run
make the same calls and get the same answers.
Held by: tests/test_subject.py (argmax and log-softmax of the full forward pass; batched == one by one; meshes).

B batch  T tokens of a call  D model  V vocab
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import progress
from longctx.data.tasks.example import Example
from longctx.data.tokenizer import Tokenizer
from longctx.errors import check, check_range
from longctx.inference import sampling
from longctx.models import attention_layer
from longctx.parallel import mesh

LEAST_ROOM = 64   # tokens: the smallest of the sizes that a call or a growing state may have


class Scored(NamedTuple):
  """Of the n - 1 tokens after a row's first."""

  logprobs: np.ndarray   # float64: log p(token | all before it), natural
  greedy: np.ndarray     # bool: no other token was likelier, and no earlier id as likely


class Subject(Protocol):
  """A model, or what stands in for one."""

  tokenizer: Tokenizer
  max_length: int        # most tokens that a prompt and its answer may have together; 0: any number

  def generate(self, prompts: Sequence[np.ndarray], max_new_tokens: int,
               stops: Sequence[bytes] = ()) -> list[np.ndarray]:
    """The likeliest tokens after each prompt, int32, the separator and what follows it left out.

    A prompt has at least one token, by custom the separator first. What is written ends with the token
    that completes one of `stops`, if that comes before max_new_tokens; `before_stop` cuts its text.
    """

  def score(self, rows: Sequence[np.ndarray]) -> list[Scored]:
    """How likely each row's tokens are, the first aside; a row has at least one."""


def prompt_tokens(tokenizer: Tokenizer, text: bytes, name: str = 'the text') -> np.ndarray:
  """What is read of a text, int32: the separator first. `name`: of the text, for the error."""
  return np.concatenate([[tokenizer.separator], tokenizer.encode(text, name)]).astype(np.int32)


def before_stop(text: bytes, stops: Sequence[bytes]) -> bytes:
  """A text up to the first place where any of `stops` begins."""
  found = [at for at in map(text.find, stops) if at >= 0]
  return text[:min(found)] if found else text


def room(tokens: int) -> int:
  """The least of 64, 96, 128, 192, 256, ... that holds so many: sizes no more than a half apart."""
  size = LEAST_ROOM
  while size < tokens:
    if size + size // 2 >= tokens:
      return size + size // 2
    size *= 2
  return size


class ModelSubject:
  """A model of this library."""

  def __init__(self, graphdef: nnx.GraphDef, params: Any, tokenizer: Tokenizer, *,
               layout: mesh.Layout | None, batch_size: int, segment: int):
    """Allocates nothing.

    Args:
      graphdef, params: the two halves of `nnx.split(model)`; params placed as `layout` says.
      tokenizer: the one that the model was trained with.
      layout: the mesh that cuts rows and tokens; None: one device.
      batch_size: rows read at once.
      segment: tokens of a row and call.
    """
    check_range('batch_size', batch_size, low=1)
    check_range('segment', segment, low=1)
    self.graphdef, self.params, self.tokenizer, self.layout = graphdef, params, tokenizer, layout
    self.batch_size, self.segment = batch_size, segment
    self.model = nnx.merge(graphdef, params)
    self.max_length = self.model.config.max_length
    self._shardings: dict[int, Any] = {}   # capacity -> of the state
    if layout is not None:
      mesh.check_divides('batch_size', batch_size, 'batch', layout)
      mesh.check_divides('segment', segment, 'length', layout)

  def generate(self, prompts: Sequence[np.ndarray], max_new_tokens: int,
               stops: Sequence[bytes] = ()) -> list[np.ndarray]:
    check_range('max_new_tokens', max_new_tokens, low=1)
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for rows, size in self._batches(prompts, max_new_tokens):
      given = [prompts[row] for row in rows]
      given += [np.array([self.tokenizer.separator], np.int32)] * (self.batch_size - len(rows))
      for row, tokens in zip(rows, self._written(given, len(rows), max_new_tokens, stops, size)):
        found[row] = np.array(tokens, np.int32)
    return found

  def _written(self, prompts: list[np.ndarray], count: int, max_new_tokens: int,
               stops: Sequence[bytes], size: int) -> list[list[int]]:
    """What is written after the first `count` of the prompts."""
    capacity = self._capacity(size)
    run = sampling.programs(
        self.graphdef, sampling.Sampling(temperature=0), self.tokenizer.separator,
        tuple(range(self.tokenizer.vocab_size, self.model.config.vocab_size)), self.layout,
        self._state_shardings(capacity))
    memory = sampling.Memory(run.fresh(self.batch_size, capacity, self.params),
                             [np.asarray(prompt, np.int32) for prompt in prompts])
    hidden_BD = sampling.read_tail(run, self.params, memory, self._chunk(size))
    written: list[list[int]] = [[] for _ in range(count)]
    going = set(range(count))
    for token_B in sampling.decode(run, self.params, hidden_BD, memory, seed=0,
                                   max_new_tokens=max_new_tokens,
                                   stop_token=self.tokenizer.separator):
      for row in sorted(going):
        if token_B[row] == sampling.ENDED:
          going.discard(row)
          continue
        written[row].append(int(token_B[row]))
        if stops and any(stop in self.tokenizer.decode(written[row]) for stop in stops):
          going.discard(row)
      if not going:
        break
    return written

  def score(self, rows: Sequence[np.ndarray]) -> list[Scored]:
    found = [Scored(np.zeros(max(0, len(row) - 1)), np.zeros(max(0, len(row) - 1), bool))
             for row in rows]
    for batch, size in self._batches(rows, -1):   # the last token is scored and not read
      chunk = self._chunk(size)
      carries = size > chunk
      capacity = self._capacity(size)
      fresh, score = _scorers(self.graphdef, self.layout, carries, self.batch_size, capacity,
                              self.tokenizer.vocab_size,
                              self._state_shardings(capacity) if carries else None)
      state = fresh(self.params)
      for low in range(0, size, chunk):
        pieces = [rows[row][low:low + chunk + 1] for row in batch]
        logprob_BT, greedy_BT, state = score(self.params, state, *self._call(pieces, chunk))
        logprob_BT, greedy_BT = np.asarray(logprob_BT), np.asarray(greedy_BT)
        progress.moved()
        for at, (row, piece) in enumerate(zip(batch, pieces)):
          count = max(0, len(piece) - 1)
          found[row].logprobs[low:low + count] = logprob_BT[at, :count]
          found[row].greedy[low:low + count] = greedy_BT[at, :count]
    return found

  def _call(self, pieces: list[np.ndarray], chunk: int) -> tuple[np.ndarray, ...]:
    """tokens, targets, valid [B, chunk] of pieces of up to chunk + 1 tokens."""
    tokens_BT = np.zeros((self.batch_size, chunk), np.int32)
    targets_BT, valid_BT = np.zeros_like(tokens_BT), np.zeros(tokens_BT.shape, bool)
    for row, piece in enumerate(pieces):
      count = max(0, len(piece) - 1)
      tokens_BT[row, :count], targets_BT[row, :count] = piece[:count], piece[1:]
      valid_BT[row, :count] = True
    return tokens_BT, targets_BT, valid_BT

  # Shapes.

  def _batches(self, rows: Sequence[np.ndarray], more: int) -> Iterator[tuple[list[int], int]]:
    """(indices of the rows that go together, tokens of the longest with `more`), longest first."""
    lengths = [len(row) for row in rows]
    if lengths and min(lengths) < 1:
      raise ValueError(f'rows of {lengths} tokens: each must have at least 1, the separator')
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    for at in range(0, len(order), self.batch_size):
      batch = order[at:at + self.batch_size]
      size = lengths[batch[0]] + more
      check(not self.max_length or size <= self.max_length,
            f'{lengths[batch[0]]:,} tokens of a text, with what is to be written {size:,}: must be at most '
            f'model.max_length={self.max_length:,}; give a shorter text')
      yield batch, size

  def _chunk(self, size: int) -> int:
    """Tokens a call: the segment, or less where rows are shorter, in equal parts for the mesh."""
    parts = self.layout.size('length') if self.layout else 1
    return min(self.segment, -(-room(size) // parts) * parts)

  def _capacity(self, size: int) -> int:
    """Room for so many tokens in a state that grows; 0: the model's own, which does not."""
    return room(size) if self.model.state_grows else 0

  def _state_shardings(self, capacity: int) -> Any:
    """Where the state of a batch stands; None on one device."""
    if self.layout is not None and capacity not in self._shardings:
      fresh = lambda params: nnx.merge(self.graphdef, params).init_state(
          self.batch_size, capacity=capacity)
      shapes = jax.eval_shape(mesh.under(self.layout, fresh), self.params)
      self._shardings[capacity] = attention_layer.shardings(self.layout, shapes)
    return self._shardings.get(capacity)


LOGITS = 64   # tokens of a row and device whose logits exist at once


@functools.lru_cache(maxsize=8)
def _scorers(graphdef, layout, carries, batch_size, capacity, vocab_size, state) -> tuple[Any, Any]:
  """(params -> state, (params, state, tokens, targets, valid) -> log p, greedy, state), compiled."""
  wrap = functools.partial(mesh.under, layout) if layout else lambda function: function
  whole = layout.sharding() if layout else None
  parts = layout.size('length') if layout else 1

  def fresh(params):
    return nnx.merge(graphdef, params).init_state(batch_size, capacity=capacity)

  def score(params, state, tokens_BT, targets_BT, valid_BT):
    model = nnx.merge(graphdef, params)
    # Without a state, padding at a row's end changes nothing before it.
    hidden_BTD, state = model(tokens_BT, state, valid_BT=valid_BT if carries else None)

    def of_chunk(_, chunk):
      hidden_BRCD, targets_BRC = chunk
      B, R, C, D = hidden_BRCD.shape
      logits_BTV = model.logits(hidden_BRCD.reshape(B, R * C, D))[..., :vocab_size]
      logits_BRCV = logits_BTV.reshape(B, R, C, -1).astype(jnp.float32)
      logprobs_BRCV = jax.nn.log_softmax(logits_BRCV)
      of_target_BRC = jnp.take_along_axis(logprobs_BRCV, targets_BRC[..., None], -1)[..., 0]
      return None, (of_target_BRC, jnp.argmax(logits_BRCV, -1) == targets_BRC)

    # Each device walks its own part of the tokens: no chunk moves any between devices.
    B, T = targets_BT.shape
    size = max(c for c in range(1, min(LOGITS, T // parts) + 1) if T // parts % c == 0)
    cut = lambda x: jnp.moveaxis(x.reshape(B, parts, T // parts // size, size, *x.shape[2:]), 2, 0)
    back = lambda x: jnp.moveaxis(x, 0, 2).reshape(B, T)
    _, (logprob, greedy) = jax.lax.scan(of_chunk, None, (cut(hidden_BTD), cut(targets_BT)))
    return back(logprob), back(greedy), state

  return (jax.jit(wrap(fresh), out_shardings=state) if carries else lambda params: None,
          jax.jit(wrap(score), donate_argnums=1,
                  out_shardings=(whole, whole, state) if layout else None))


class Oracle:
  """Answers the examples it was shown as they are to be answered, and any other prompt with nothing."""

  max_length = 0

  def __init__(self, tokenizer: Tokenizer, examples: Iterable[Example]):
    self.tokenizer = tokenizer
    self._targets = {example.prompt: example.target for example in examples}

  def generate(self, prompts: Sequence[np.ndarray], max_new_tokens: int,
               stops: Sequence[bytes] = ()) -> list[np.ndarray]:
    del stops   # the right answer is what ends it
    answers = [self._targets.get(self.tokenizer.decode(prompt[1:]), b'') for prompt in prompts]
    return [self.tokenizer.encode(answer)[:max_new_tokens] for answer in answers]

  def score(self, rows: Sequence[np.ndarray]) -> list[Scored]:
    """As sure of every token as can be."""
    return [Scored(np.zeros(len(row) - 1), np.ones(len(row) - 1, bool)) for row in rows]


class Constant:
  """Writes one text whatever it is asked, and holds every token equally likely."""

  max_length = 0

  def __init__(self, tokenizer: Tokenizer, text: bytes):
    self.tokenizer, self._text = tokenizer, text

  def generate(self, prompts: Sequence[np.ndarray], max_new_tokens: int,
               stops: Sequence[bytes] = ()) -> list[np.ndarray]:
    tokens = self.tokenizer.encode(before_stop(self._text, stops))[:max_new_tokens]
    return [tokens] * len(prompts)

  def score(self, rows: Sequence[np.ndarray]) -> list[Scored]:
    return [Scored(np.full(len(row) - 1, -np.log(self.tokenizer.vocab_size)), row[1:] == 0)
            for row in rows]
