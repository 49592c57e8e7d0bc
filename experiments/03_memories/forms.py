"""The orders in which segments may be read, against each other: equal, and how fast?

  infini         all 64 segments of 128 at once (class P1) against one by one
  armt           wavefront over layers and segments (class P2) against one by one
  infini alone   the memory without a model around it: its states before each segment and what is read there

Both orders take turns; the median of each and of their ratio, forward alone and with the backward pass.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import shared
from longctx.assembly import make_model
from longctx.memory import infini
from longctx.models import memory_config

ORDERS = {'infini': 'parallel', 'armt': 'wavefront'}   # against 'sequential'
# Segments, tokens of one, width, layers.
SHAPES = ((64, 8, 64, 2), (64, 128, 32, 2), (64, 128, 64, 4), (64, 128, 128, 4), (64, 32, 128, 8))
ALONE = ((64, 128, 32, 1), (64, 128, 128, 4), (64, 128, 128, 2))   # segments, tokens of one, width, heads
ROUNDS = 7


def runs(args, tier, done) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for kind, order in ORDERS.items():
    if not args.models or kind in args.models:
      for segments, size, dim, layers in tier['forms']:
        key = dict(kind=kind, order=order, segments=segments, segment=size, embed_dim=dim,
                   num_layers=layers)
        yield key, lambda key=key: one(**key)
  if not args.models or 'infini' in args.models:
    for segments, size, dim, heads in tier['forms_alone']:
      key = dict(kind='infini alone', order='parallel', segments=segments, segment=size, embed_dim=dim, heads=heads)
      yield key, lambda key=key: alone(**key)


def one(kind: str, order: str, segments: int, segment: int, embed_dim: int, num_layers: int) -> dict:
  config = memory_config.Config(vocab_size=256, long_term=kind, segment=segment, embed_dim=embed_dim,
                                num_layers=num_layers, num_heads=embed_dim // 32, remat='none')
  graphdef, params = nnx.split(make_model(config, jax.random.key(0)))
  # W_value of a memory may begin at 0: something to remember, in every parameter.
  params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params)
  tokens = jax.random.randint(jax.random.key(2), (1, segments, segment), 0, 256)
  valid, number = jnp.ones(tokens.shape, bool), jnp.zeros((1,), jnp.int32)

  def forward(order, params):
    model = nnx.merge(graphdef, params)
    return model.read_segments(tokens, valid, number, model.fresh(1), schedule=order)[0]

  return timed(forward, order, params)


def alone(kind: str, order: str, segments: int, segment: int, embed_dim: int, heads: int) -> dict:
  del kind
  head_dim = embed_dim // heads
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, segments, segment, heads, head_dim))
  valid, start = jnp.ones((1, segments, segment), bool), infini.empty(1, heads, head_dim)

  def forward(order, qkv):
    if order == 'parallel':
      before, _ = infini.before(start, *qkv[1:], valid, delta=True)
      cells = lambda x: x.reshape(-1, *x.shape[2:])
      return infini.read(jax.tree.map(cells, before), cells(qkv[0]))

    def step(state, cell):
      q, k, v, valid = cell
      return infini.write(state, k, v, valid, delta=True), infini.read(state, q)
    return jax.lax.scan(step, start, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*qkv, valid)))[1][:, 0]

  return timed(forward, order, (q, k, v))


def timed(forward: Callable, order: str, inputs) -> dict:
  """forward(order, inputs) against its sequential order: differences, seconds, ratios."""
  row = {}
  for name, function in (('forward', forward), ('both', lambda order, inputs: jax.grad(
      lambda inputs: jnp.square(forward(order, inputs)[..., 0]).mean())(inputs))):
    run = {o: jax.jit(lambda inputs, o=o, function=function: function(o, inputs))
           for o in (order, 'sequential')}
    out = {o: jax.block_until_ready(f(inputs)) for o, f in run.items()}
    row[f'difference_{name}'] = difference(out[order], out['sequential'])
    times = {o: [] for o in run}
    for _ in range(ROUNDS):
      for o, f in run.items():
        begin = time.perf_counter()
        jax.block_until_ready(f(inputs))
        times[o].append(time.perf_counter() - begin)
    for o in run:
      row[f'{"sequential" if o == "sequential" else "order"}_{name}'] = statistics.median(times[o])
    row[f'ratio_{name}'] = statistics.median(
        b / a for a, b in zip(times[order], times['sequential']))
  return row


def difference(a, b) -> float:
  """The largest difference of an array, as a part of that array's largest value; of all arrays."""
  parts = [np.abs(np.asarray(x) - np.asarray(y)).max() / max(np.abs(np.asarray(y)).max(), 1e-30)
           for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
  return float(max(parts))


def told(row: dict) -> str:
  return f'{row["embed_dim"]}, ' + (f'heads {row["heads"]}' if 'heads' in row else str(row['num_layers']))


def table(rows: list[dict]) -> str:
  lines = ['| memory, order | segments x tokens | width, layers | one by one, ms | in this order, ms | '
           'faster | forward and backward: faster | values | gradients |', '|---' * 9 + '|']
  for r in rows:
    lines.append(
        f'| {r["kind"]}, {r["order"]} | {r["segments"]} x {r["segment"]} | {told(r)} '
        f'| {1000 * r["sequential_forward"]:.1f} | {1000 * r["order_forward"]:.1f} '
        f'| **{r["ratio_forward"]:.2f}** | **{r["ratio_both"]:.2f}** | '
        f'{r["difference_forward"]:.1e} | {r["difference_both"]:.1e} |')
  return '\n'.join(lines)


def draw(rows: list[dict], path: str) -> None:
  def panels(figure):
    axis = figure.subplots()
    labels = [f'{r["kind"]}\n{r["segments"]} x {r["segment"]}\n{told(r)}' for r in rows]
    for shift, name in ((-0.2, 'forward'), (0.2, 'both')):
      axis.bar(np.arange(len(rows)) + shift, [r[f'ratio_{name}'] for r in rows], 0.4, label=name)
    axis.set_xticks(range(len(rows)), labels, fontsize=6)
    axis.axhline(1, color='0.5', linewidth=0.8)
    axis.set(ylabel='times as fast as one by one')
    axis.legend(fontsize=6)
  shared.draw(panels, path, width=10, height=4)
