"""What one answer drew on: which tokens, heads and slots of a memory, in one prompt on one
checkpoint.

The prompt is read as ever, in chunks with the state carried, and what each layer remembers is
measured after every chunk. The answer's tokens are then read with somebody watching
(longctx/watch.py): by a decoder one token at a time against its caches, by a memory model in the
cells of their segments. Rows of the answer's tokens are all that is kept of any [T, T] map, so that
long prompts work.

Occlusion asks the model itself, of whatever kind: pieces of the prompt are put out (spaces in their
place), and how much less likely that makes the answer is what it owes to the piece, in nats. The
two pieces that mattered most are cut finer, until tokens are reached.

What is shown is what the model did: the log-probabilities of the watched answer are kept beside
those of the plain pass, and tests hold them to each other. Recurrent stacks (lstm, gru ...) have
neither attention nor slots: their state's norms and occlusion are all there is, and `notes` says
so.
Held by: tests/test_inspect.py.

R rows: the answer's tokens but the last, and the prompt's last  N heads  T tokens of prompt and
answer
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import watch
from longctx.errors import check, check_range
from longctx.evaluation import reads
from longctx.evaluation.subject import Subject
from longctx.models import stack
from longctx.models.attention_layer import Cache
from longctx.models.decoder import Decoder
from longctx.models.memories.base import Cell
from longctx.models.memory_decoder import MemoryDecoder

FINER = 2      # pieces that are cut again
POINTS = 64    # times that the states are measured, at most
KEYS_KEPT = 'keys kept'


class Layer(NamedTuple):
  """What the answer's tokens did in one layer."""

  index: int
  kind: str
  maps: dict[str, reads.Read]          # by name: attention, retrieved, segments
  states_NRS: np.ndarray | None        # attention to state vectors, which stand for no token
  numbers_NR: dict[str, np.ndarray]    # by name: gate, read strength ...


class Norms(NamedTuple):
  """How much each layer's state holds while the prompt is read."""

  tokens: np.ndarray                   # read so far, of each point
  series: dict[tuple[int, str], np.ndarray]   # (layer, array of its state) -> its Frobenius norm


@dataclasses.dataclass(frozen=True)
class Inspection:
  """One prompt and answer; token 0 is the separator."""

  tokens_T: np.ndarray
  prompt: int                          # tokens of the prompt; the rest is the answer
  logprobs: np.ndarray                 # of the answer's tokens, as they were watched
  layers: tuple[Layer, ...]
  norms: Norms
  occlusion_T: np.ndarray | None = (
    None  # nats that the answer loses without the piece a token is in
  )
  notes: tuple[str, ...] = ()          # what this model has not got


def inspect(graphdef: nnx.GraphDef, params: Any, prompt: np.ndarray, answer: np.ndarray, *,
            layers: Sequence[int] = (), chunk: int = 256) -> Inspection:
  """Reads a prompt (the separator first) and an answer of at least one token, on one device.

  Args:
    graphdef, params: the two halves of `nnx.split(model)`.
    layers: whose maps are kept; (): all. Each takes 4 N R T bytes on the host.
    chunk: tokens a call, at most.
  """
  check(
    len(answer) > 0,
    'inspect: the answer is empty, so no token of it drew on anything; give a prompt '
    'that the model answers',
  )
  model = nnx.merge(graphdef, params)
  depth = model.config.num_layers
  for i in layers:
    check_range('--layers', i, 0, depth - 1)
  chosen = tuple(layers) or tuple(range(depth))
  tokens_T = np.concatenate([prompt, answer]).astype(np.int32)
  split = len(prompt) - 1   # the prompt's last token asks for the answer's first
  # Short enough for a few dozen points, in sizes that prompts of like length share.
  chunk = min(chunk, max(16, 1 << (split // POINTS).bit_length()))
  if isinstance(model, MemoryDecoder):
    run, notes = _memory_rows, ()
    split -= split % model.config.segment
    chunk = max(1, chunk // model.config.segment) * model.config.segment
  elif isinstance(model, Decoder):
    run, notes = _decoder_rows, ()
    plain = [m for m in dict.fromkeys(model.config.layers) if m != 'attention']
    if plain:
      notes = (
        f'layers of {", ".join(plain)} keep no token by itself, so they have no map over tokens: '
        'see what they said, the norms of their states, and occlusion',
      )
  else:
    run = _plain_rows
    notes = (
      f'model.name={model.config.name!r} has neither attention nor slots of a memory: norms of its '
      'states and occlusion are all there is',
    )
  room = -(-len(tokens_T) // chunk) * chunk if model.state_grows else 0
  state, norms = _read(graphdef, params, tokens_T[:split], chunk, room)
  found, logprobs = run(graphdef, params, tokens_T, split, len(prompt) - 1, state, chosen)
  return Inspection(tokens_T, len(prompt), logprobs, found, norms, None, notes)


# The prompt.


def _read(graphdef, params, tokens_T, chunk, room) -> tuple[Any, Norms]:
  """The state after these tokens, and the norms on the way."""
  every = chunk * max(1, -(-len(tokens_T) // (chunk * POINTS)))
  read, fresh = _reader(graphdef, chunk, room)
  state, points, measured = fresh(params), [], []
  for low in range(0, len(tokens_T), chunk):
    part = tokens_T[low:low + chunk]
    given = np.zeros((1, chunk), np.int32)
    given[0, :len(part)] = part
    state, norms = read(params, state, given, np.arange(chunk)[None] < len(part))
    if low % every == 0 or low + chunk >= len(tokens_T):
      points.append(low + len(part))
      measured.append(norms)
  series = {
    name: np.array([float(m[name]) for m in measured]) for name in (measured[0] if measured else ())
  }
  return state, Norms(np.array(points), series)


@functools.lru_cache(maxsize=4)
def _reader(graphdef, chunk, room):
  def read(params, state, tokens_BT, valid_BT):
    _, state = nnx.merge(graphdef, params)(tokens_BT, state, valid_BT=valid_BT)
    return state, norms(state)
  fresh = lambda params: nnx.merge(graphdef, params).init_state(1, capacity=room)
  return jax.jit(read, donate_argnums=1), jax.jit(fresh)


def norms(state: Any) -> dict[tuple[int, str], jax.Array]:
  """(layer, array) -> Frobenius norm; of a cache of keys how many it holds."""
  memory = getattr(state, 'memory', None)
  layers = state.layers if memory is None else memory.layers
  # Before its first whole segment a memory means nothing.
  some = 1.0 if memory is None else (state.number[0] > 0).astype(jnp.float32)
  found = {}
  for i, layer in enumerate(layers):
    if isinstance(layer, Cache):
      found[i, KEYS_KEPT] = (layer.index[0] >= 0).sum().astype(jnp.float32)
      continue
    for path, x in jax.tree_util.tree_leaves_with_path(layer):
      if jnp.issubdtype(x.dtype, jnp.floating):
        name = jax.tree_util.keystr(path, simple=True, separator='.') or 'state'
        found[i, name] = some * jnp.linalg.norm(x[0].astype(jnp.float32).reshape(-1))
  return found


# The answer.


def _decoder_rows(graphdef, params, tokens_T, split, first, state, chosen):
  del first   # is `split`
  step = _decoder_step(graphdef, chosen)
  rows, logprobs = [], []
  for at in range(split, len(tokens_T) - 1):
    logprob_V, state, found = step(params, state, tokens_T[None, at:at + 1])
    rows.append(jax.tree.map(np.asarray, found))
    logprobs.append(float(logprob_V[tokens_T[at + 1]]))
  config, layers = nnx.merge(graphdef, params).config, []
  for place, i in enumerate(chosen):
    kind, maps = list(config.pattern())[i][0], {}
    of_layer = [row[place] for row in rows]
    if of_layer[0].attention_NRS is not None:
      parts = [reads.by_index(f.attention_NRS, f.index_S, len(tokens_T)) for f in of_layer]
      maps['attention'] = reads.Read(*(np.concatenate(x, axis=1) for x in zip(*parts)))
    numbers = {name: np.concatenate([f.numbers_NR[name] for f in of_layer], axis=1)
               for name in of_layer[0].numbers_NR}
    layers.append(Layer(i, kind, maps, None, numbers))
  return tuple(layers), np.array(logprobs)


@functools.lru_cache(maxsize=4)
def _decoder_step(graphdef, chosen):
  def step(params, state, tokens_B1):
    model = nnx.merge(graphdef, params)
    # What is told inside of a rematerialised layer cannot be carried out of it.
    model.config = dataclasses.replace(model.config, remat='none')
    with watch.told() as calls:
      hidden_B1D, state = model(tokens_B1, state)
    told = reads.layers(calls)
    found = [
      reads.found(told[i], slice(0, 1), stack.layer(model.config, model.blocks, i)) for i in chosen
    ]
    return jax.nn.log_softmax(model.logits(hidden_B1D)[0, 0]), state, found
  return jax.jit(step, donate_argnums=1)


def _memory_rows(graphdef, params, tokens_T, split, first, state, chosen):
  model = nnx.merge(graphdef, params)
  C, memory = model.config.segment, state.memory
  if not split:
    memory = model.fresh(1)
  rows, logprobs = [], []
  for start in range(split, len(tokens_T) - 1, C):
    part = tokens_T[start:start + C]
    given = np.zeros((1, C), np.int32)
    given[0, :len(part)] = part
    asked = slice(max(first - start, 0), min(C, len(tokens_T) - 1 - start))
    logprob_RV, memory, found = _memory_cell(graphdef, chosen, asked.start, asked.stop)(
        params, given, np.arange(C)[None] < len(part), np.array([start // C], np.int32), memory)
    rows.append((start // C, jax.tree.map(np.asarray, found)))
    targets = tokens_T[start + asked.start + 1:start + asked.stop + 1]
    logprobs += np.asarray(logprob_RV)[np.arange(len(targets)), targets].tolist()
  layers = [_memory_layer(model.blocks[i], i, model.config.kind(i), len(tokens_T),
                          [(number, found[place]) for number, found in rows])
            for place, i in enumerate(chosen)]
  return tuple(layers), np.array(logprobs)


def _memory_layer(block, index, kind, length, cells) -> Layer:
  """Puts together what a layer told in the cells of the answer."""
  maps: dict[str, list[reads.Read]] = {}
  for number, f in cells:
    places = reads.Places.of(block, length, number)
    if f.attention_NRS is not None:
      maps.setdefault('attention', []).append(places.attention(f.attention_NRS))
    if f.retrieved_NRP is not None:
      found_NRT = places.ring(f.retrieved_NRP, f.slots_NRP)
      maps.setdefault('retrieved', []).append(reads.Read(found_NRT, 1 - found_NRT.sum(-1)))
    if f.segments_RS is not None:
      maps.setdefault('segments', []).append(places.segments(f.segments_RS))
  join = lambda parts: np.concatenate(parts, axis=1)
  states = [f.states_NRS for _, f in cells if f.states_NRS is not None]
  return Layer(
    index,
    kind,
    {name: reads.Read(*map(join, zip(*parts))) for name, parts in maps.items()},
    join(states) if states else None,
    {name: join([f.numbers_NR[name] for _, f in cells]) for name in cells[0][1].numbers_NR},
  )


@functools.lru_cache(maxsize=8)
def _memory_cell(graphdef, chosen, low, high):
  def read(params, tokens_BC, valid_BC, number_B, memory):
    model, rows = nnx.merge(graphdef, params), slice(low, high)
    with watch.told() as calls:
      hidden_BCD, memory = model._read()(tokens_BC, Cell(valid_BC, number_B), memory, None)
    told = reads.layers(calls)
    found = [
      reads.found(
        told[i], slice(rows.start + model.front, rows.stop + model.front), model.blocks[i]
      )
      for i in chosen
    ]
    return jax.nn.log_softmax(model.logits(hidden_BCD[:, rows])[0]), memory, found
  return jax.jit(read)


def _plain_rows(graphdef, params, tokens_T, split, first, state, chosen):
  del first
  @jax.jit
  def score(params, state, tokens_BT):
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model(tokens_BT, state)
    return jax.nn.log_softmax(model.logits(hidden_BTD)[0])
  logprob_RV = np.asarray(score(params, state, tokens_T[None, split:-1]))
  targets = tokens_T[split + 1:]
  kind = nnx.merge(graphdef, params).config.name
  return (tuple(Layer(i, kind, {}, None, {}) for i in chosen),
          logprob_RV[np.arange(len(targets)), targets])


# Occlusion.


def occlude(subject: Subject, prompt: np.ndarray, answer: np.ndarray, pieces: int) -> np.ndarray:
  """[T] float32: nats that the answer loses when a token's piece is put out; 0 in the answer.

  In each of a few rounds `pieces` texts of the prompt's length are scored.
  """
  check_range('--pieces', pieces, 1)
  row = np.concatenate([prompt, answer]).astype(np.int32)
  blank = subject.tokenizer.encode(b' ')[0]
  lost_T = np.zeros(len(row), np.float32)
  logprob = lambda scored: scored.logprobs[len(prompt) - 1:].sum()
  whole = logprob(subject.score([row])[0])
  spans = [(1, len(prompt))]
  while spans:
    parts = [part for span in spans for part in _cut(*span, max(2, pieces // len(spans)))]
    rows = [
      np.where((np.arange(len(row)) >= a) & (np.arange(len(row)) < b), blank, row) for a, b in parts
    ]
    losses = [whole - logprob(scored) for scored in subject.score(rows)]
    for (low, high), loss in zip(parts, losses):
      lost_T[low:high] = loss
    best = sorted(range(len(parts)), key=lambda i: -losses[i])[:FINER]
    spans = [parts[i] for i in sorted(best) if parts[i][1] - parts[i][0] > 1 and losses[i] > 0]
  return lost_T


def _cut(low: int, high: int, count: int) -> list[tuple[int, int]]:
  """A span of tokens in `count` parts of like length, none empty."""
  ends = np.unique(np.linspace(low, high, min(count, high - low) + 1).round().astype(int)).tolist()
  return list(itertools.pairwise(ends))
