"""How much faster is each recurrent mixer side by side than token by token, forward and backward?

    python experiments/02_recurrences/forms.py                          # every mixer, T 4096, d 256
    python experiments/02_recurrences/forms.py --mixers=gla,rglru --chunks=32,64,128

One layer, one row, float32. Three ways to compute the same numbers:

    tokens      the layer one token at a time, its state carried by a lax.scan: what the model means
    recurrence  projections and convolution for all tokens at once, only the recurrence by tokens
    chunked     the default

All are compiled first and then take turns, so that other work on the machine falls on all alike; the
measure is the median of CPU time (user and system) and of wall time, in milliseconds.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from longctx.models.context import new_clock, place_tokens
from longctx.models.mixers import MIXERS
from longctx.models.mixers.base import Settings
from longctx.parallel import mesh


def whole(mixer, x_BTD, state):
  context, _ = place_tokens(jnp.zeros(x_BTD.shape[:2], jnp.int32), None, None, None, None)
  return mixer(x_BTD, state, context)[0]


def tokens(mixer, x_BTD, state):
  def step(carry, x_BD):
    state, clock = carry
    context, clock = place_tokens(jnp.zeros((x_BD.shape[0], 1), jnp.int32), clock, None, None, None)
    y_B1D, state = mixer(x_BD[:, None], state, context)
    return (state, clock), y_B1D[:, 0]
  start = (state, new_clock(x_BTD.shape[0]))
  return jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(x_BTD, 0, 1))[1], 0, 1)


def compiled(name, way, chunk, args):
  """A function of nothing that runs forward and backward once, and what it gives."""
  form = 'sequential' if way == 'recurrence' else 'auto'
  settings = Settings(dim=args.dim, num_heads=args.heads, form=form, chunk=chunk)
  mixer = MIXERS[name](settings, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(mixer)
  keys = jax.random.split(jax.random.key(1))
  x_BTD, weight = (jax.random.normal(k, (args.batch, args.length, args.dim)) for k in keys)
  apply = tokens if way == 'tokens' else whole
  def loss(params, x_BTD):
    mixer = nnx.merge(graphdef, params)
    return (apply(mixer, x_BTD, mixer.init_state(args.batch)) * weight).sum()
  layout = mesh.make_layout(mesh.Config(layout='single'))
  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)),
                compiler_options=mesh.compiler_options(layout)).lower(params, x_BTD).compile()
  return functools.partial(run, params, x_BTD)


def timed(run):
  wall, cpu = time.perf_counter(), time.process_time()
  jax.block_until_ready(run())
  return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def measure(name, chunks, args):
  runs = {'tokens': compiled(name, 'tokens', 0, args),
          'recurrence': compiled(name, 'recurrence', 0, args)}
  for chunk in chunks:
    runs[f'chunk {chunk}' if chunk else 'chunked'] = compiled(name, 'chunked', chunk, args)
  values = {way: run() for way, run in runs.items()}
  error = max(abs(float(v[0] - values['tokens'][0])) for v in values.values())
  times = {way: [] for way in runs}
  for _ in range(args.rounds):
    for way, run in runs.items():
      times[way].append(timed(run))
  found = {way: {'wall': statistics.median(w for w, _ in t), 'cpu': statistics.median(c for _, c in t)}
           for way, t in times.items()}
  return found, error / max(1.0, abs(float(values['tokens'][0])))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--mixers', default=','.join(MIXERS))
  parser.add_argument('--chunks', default='0', help='tokens of a chunk, as 32,64; 0: the default')
  for flag, default in (('length', 4096), ('dim', 256), ('heads', 4), ('batch', 1), ('rounds', 3)):
    parser.add_argument(f'--{flag}', type=int, default=default)
  parser.add_argument('--json', default='', help='where to write the figures')
  args = parser.parse_args()
  chunks = [int(c) for c in args.chunks.split(',')]
  figures = {}
  print(f'd {args.dim}, {args.heads} heads, T {args.length}, batch {args.batch}: '
        'CPU ms (wall ms), and how many times faster than by tokens and by recurrence')
  for name in args.mixers.split(','):
    found, error = measure(name, chunks, args)
    figures[name] = found
    slow, middle = found['tokens'], found['recurrence']
    text = [f'{way} {t["cpu"]:.0f} ({t["wall"]:.0f})' for way, t in found.items()]
    gains = [f'{slow["cpu"] / t["cpu"]:.1f} {middle["cpu"] / t["cpu"]:.1f}'
             for way, t in found.items() if way.startswith('chunk')]
    print(f'{name:18}', '  '.join(text), '  x', ' | '.join(gains), f'  error {error:.0e}', flush=True)
  if args.json:
    with open(args.json, 'w') as file:
      json.dump({'settings': vars(args), 'ms': figures}, file, indent=1)


if __name__ == '__main__':
  main()
