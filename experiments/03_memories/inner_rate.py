"""Titans' memory over 1,000 chunks at inner learning rates that throw the naive form to infinity.

A chunk's 64 gradients are taken at one set of weights. Eight keys that come back eight times each are then
eight steps of eight times the length; past a rate of about 1 over the repeats a memory without a clip is
thrown further at every chunk. longctx/memory/titans.py clips each token's gradient to norm 1 instead;
`clip=inf` is the naive form. Width 4 x 16, two matrices, alpha and eta as a fresh layer has them.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments import shared
from longctx.memory import titans

RATES = (1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
CHUNK, HEAD, KEYS = 64, 16, 8


def runs(args, tier, done) -> Iterator[tuple[dict, Callable[[], dict]]]:
  if args.models and 'titans' not in {m.split('_')[0] for m in args.models}:
    return
  for rate in RATES:
    for clip in (titans.MAX_NORM, math.inf):
      key = dict(inner_rate=rate, clip=str(clip), chunks=tier['inner_chunks'])
      yield key, lambda key=key: one(**key)


def one(inner_rate: float, clip: str, chunks: int) -> dict:
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  keys, values = unit(rng.normal(size=(KEYS, HEAD))), rng.normal(size=(KEYS, HEAD))
  which = rng.permuted(np.tile(np.arange(KEYS), (chunks, CHUNK // KEYS)), axis=1)
  k, v = (jnp.asarray(x[which], jnp.float32)[:, None, None] for x in (keys, values))
  fill = lambda x: jnp.full((chunks, 1, 1, CHUNK), x)
  tokens = titans.Tokens(k, k, v, fill(0.007), fill(0.5), fill(inner_rate),
                         jnp.ones((chunks, 1, 1, CHUNK), bool))
  shapes = titans.shapes(HEAD, 4 * HEAD, 2)
  weights = tuple(jnp.asarray(rng.normal(size=(1, 1, *s)) * s[0] ** -0.5, jnp.float32) for s in shapes)

  def step(state, tokens):
    _, state = titans.chunk(state, tokens, float(clip))
    largest = jnp.stack([jnp.abs(w).max() for w in state.weights]).max()
    return state, (largest, jnp.square(titans.read(state.weights, tokens.k) - tokens.v).mean())

  start = titans.State(weights, tuple(map(jnp.zeros_like, weights)))
  _, (largest, error) = jax.jit(lambda s: jax.lax.scan(step, s, tokens))(start)
  largest, error = np.asarray(largest), np.asarray(error)
  lost = np.flatnonzero(~np.isfinite(largest) | ~np.isfinite(error))
  seen = slice(None, None, max(1, chunks // 100))
  return dict(lost_after=int(lost[0]) + 1 if len(lost) else None,
              largest=float(largest.max()) if not len(lost) else None,
              error=float(error[-1]) if not len(lost) else None,
              curve=[float(x) if np.isfinite(x) else None for x in error[seen]])


def table(rows: list[dict]) -> str:
  lines = ['| inner rate | clip | chunks | lost after | largest weight | mean square error at the end |',
           '|---' * 6 + '|']
  for r in rows:
    cell = lambda x, form: '-' if x is None else format(x, form)
    lines.append(f'| {r["inner_rate"]:g} | {r["clip"]} | {r["chunks"]:,} | '
                 f'{cell(r["lost_after"], "d")} | {cell(r["largest"], ".3g")} | '
                 f'{cell(r["error"], ".2g")} |')
  return '\n'.join(lines)


def draw(rows: list[dict], path: str) -> None:
  def panels(figure):
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, held) in zip(axes, (('clipped', True), ('naive', False))):
      for r in rows:
        if (r['clip'] != 'inf') == held:
          y = np.array(r['curve'], float)
          axis.plot(np.linspace(1, r['chunks'], len(y)), np.clip(y, 1e-9, 1e9), linewidth=1,
                    label=f'{r["inner_rate"]:g}')
      axis.set(title=title, xlabel='chunks of 64 tokens', yscale='log',
               ylabel='mean square error of what was learned')
      axis.legend(fontsize=6, title='inner rate')
  shared.draw(panels, path, width=9, height=4)
