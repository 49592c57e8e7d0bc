"""--mode=plan: the memory that a device will need, part by part, before anything is compiled.

What stays (parameters, optimiser, averages, batch) and what the forward pass keeps for the backward
pass are read from shapes: `jax.vjp` of the abstract model says what it keeps under the config's
remat policy. What lives for a moment is a closed form of those shapes, its factors measured on
compiled programs (the constants below); the total is that of the moment that needs most:

    loss       what is kept, a chunk's logits, the table whole and its gradient
    backward   what is kept, all gradients, one layer made again and turned back
    update     all gradients

Held by: tests/test_plan.py (within 10 % of compiled programs).

B batch  T tokens  D model  V vocab  L layers  K kv heads  H head dim
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from longctx import assembly
from longctx.compile import write
from longctx.configuration import parts
from longctx.models.layers import DTYPES
from longctx.parallel import aot, mesh
from longctx.parallel.chips import Chip
from longctx.training import step

FLOAT = 4   # bytes of parameters, moments, gradients, logits
# What a layer would keep without remat is so many times alive while it is turned back. A TPU's
# compiler makes more of it again than it holds; others are taken to be as a CPU's.
TURNED = {
    'cpu': {'none': 1.35, 'dots': 1.2, 'dots_no_batch': 1.2, 'full': 1.55, 'offload': 1.55},
    'tpu': {'none': 0.63, 'dots': 0.63, 'dots_no_batch': 0.63, 'full': 0.63, 'offload': 0.63},
}
# A CPU multiplies bfloat16 as float32, and holds both.
WIDENED = 1.42
# Gradients of stacked layers stand beside the gradients: transposed, or on their way to being
# summed over devices that share a parameter.
BESIDE, BESIDE_SHARED = 0.45, 1.2
LOGITS = 2    # of a chunk, at once


class Part(NamedTuple):
  """One line of the plan: bytes of a device, and the moments at which they are there."""

  name: str
  bytes: int
  moments: tuple[str, ...]
  turn: str = ''          # the setting that makes it smaller


MOMENTS = ('loss', 'backward', 'update')
WIDER = 'cut it over more devices: mesh.layout, mesh.data, mesh.seq, or a larger --topology'


def run(config: Any, folder: str, topology: str) -> int:
  """Prints the plan and writes folder/plan.json; 1 where the step will not fit, else 0."""
  if topology:
    chip, count = aot.check_topology(topology)
    found = plan(config, aot.stand_ins(chip, count))
  else:
    chip, found = aot.chip_of(jax.devices()[0].device_kind), plan(config)
  moment, total = peak(found)
  fits = None if chip is None else total <= chip.memory_bytes
  print(table(found, chip), flush=True)
  path = write(folder, 'plan.json', dict(
      topology=topology, chip=chip.memory_bytes if chip else 0, moment=moment, total=total,
      fits=fits, parts=[part._asdict() for part in found]))
  print(path, flush=True)
  return 1 if fits is False else 0


def peak(found: list[Part]) -> tuple[str, int]:
  """(moment, bytes): when most is needed, and how much."""
  sums = {moment: sum(p.bytes for p in found if moment in p.moments) for moment in MOMENTS}
  moment = max(sums, key=sums.get)
  return moment, sums[moment]


def table(found: list[Part], chip: Chip | None = None) -> str:
  """The plan as lines to read, and what to turn where it does not fit."""
  moment, total = peak(found)
  gib = lambda n: f'{n / 2**30:9.3f} GiB'
  lines = [f'memory of a device, most of it in the {moment}:']
  for p in found:
    when = '' if moment in p.moments else (
        f'   in the {", ".join(p.moments)}: not counted' if p.moments else '   not of the device')
    lines.append(f'  {p.name:<34}{gib(p.bytes)}{when}')
  fits = chip is None or total <= chip.memory_bytes
  of = f' of {chip.memory:g} GiB: {"fits" if fits else "DOES NOT FIT"}' if chip else ''
  lines.append(f'  {"total":<34}{gib(total)}{of}')
  if not fits:
    large = sorted((p for p in found if moment in p.moments and p.turn), key=lambda p: -p.bytes)
    lines += ['what makes it smaller, the largest part first:']
    lines += [f'  {p.name}: {p.turn}' for p in large[:4]]
  return '\n'.join(lines)


def plan(config: Any, devices: list | None = None) -> list[Part]:
  """The parts of a train step's memory of one device; `devices` may be stand-ins."""
  assembly.assemble(config, devices)   # refuses what cannot work
  config = _quick_to_trace(config)
  a = assembly.assemble(config, devices)
  p, model = a.parts, a.model_config
  share = lambda tree: sum(map(_share, jax.tree.leaves(tree)))
  kept = saved(a)
  remat = getattr(model, 'remat', 'none')
  platform = a.layout.mesh.devices.flat[0].platform
  turned = TURNED.get(platform, TURNED['cpu'])[remat]
  turned *= WIDENED if platform == 'cpu' and _width(a) < FLOAT else 1.0
  away = _on_the_host(a) if remat == 'offload' else 0
  shorter = 'mesh.seq larger, data.length or data.batch_size smaller, run.accumulate larger'
  found = [
      Part('parameters', share(a.abstract.params), MOMENTS, WIDER),
      Part('optimiser', share(a.abstract.opt), MOMENTS, f'{WIDER}; or optimizer.name'),
      Part('averaged parameters', share(a.abstract.ema), MOMENTS, 'optimizer.ema=0'),
      Part('carried state', share(a.abstract.memory), MOMENTS, 'data.batch_size smaller'),
      Part('batch', share(a.abstract_batch()), MOMENTS),
      Part('gradients', share(a.abstract.params), ('backward', 'update'), WIDER),
      Part('gradients summed before', share(a.abstract.params) if p.run.accumulate > 1 else 0,
           MOMENTS, 'run.accumulate=1'),
      Part('kept from forward to backward', kept.activations - away, ('loss', 'backward'),
           {'offload': shorter, 'full': f"model.remat='offload' (GPU, TPU); {shorter}"}.get(
               remat, f"model.remat='full'; {shorter}")),
      Part('on the host', away, ()),
      Part('parameters cast or sliced', kept.parameters, ('loss', 'backward')),
      Part('one layer, forward and backward', int(turned * one_layer(config, devices)),
           ('backward',), shorter),
      *_of_layers(a), *_of_blocks(a), *_of_loss(a), *_of_keys(a)]
  return [part for part in found if part.bytes]


def _share(x: jax.ShapeDtypeStruct) -> int:
  """Bytes of one device's part."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return 8
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _width(a: assembly.Assembly) -> int:
  return DTYPES[getattr(a.model_config, 'dtype', 'float32')].dtype.itemsize


def _tokens(a: assembly.Assembly) -> tuple[int, int]:
  """(rows, tokens of a row) of one device and microbatch."""
  rows = a.parts.data.batch_size // a.parts.run.accumulate // a.layout.size('batch')
  return rows, a.abstract_batch()['tokens'].shape[1] // a.layout.size('length')


def _on_the_host(a: assembly.Assembly) -> int:
  """Layer inputs but for the two that are on their way."""
  rows, T = _tokens(a)
  return max(0, a.model_config.num_layers - 2) * rows * T * a.model_config.embed_dim * _width(a)


def _of_blocks(a: assembly.Assembly) -> list[Part]:
  """Of the feed-forward layer by blocks: a block's activations, and sums of the weights' gradients."""
  model, (rows, T) = a.model_config, _tokens(a)
  block = getattr(model, 'mlp_block', 0)
  if not 0 < block < T:
    return []
  F, inner = model.mlp_dim // a.layout.size('mlp'), 2 if model.mlp == 'swiglu' else 1
  return [Part('a block of the feed-forward layer',
               rows * block * F * (2 * inner + 2) * _width(a)
               + (inner + 1) * model.embed_dim * F * FLOAT,
               ('backward',), 'model.mlp_block smaller')]


def _of_layers(a: assembly.Assembly) -> list[Part]:
  """Parameters of one layer where devices hold parts of them; gradients beside their sums."""
  share_tokens = {axis for dim in ('batch', 'length') if a.layout.size(dim) > 1
                  for axis in [a.layout.rules[dim]]}
  gathered = beside = 0
  for path, x in jax.tree_util.tree_leaves_with_path(a.abstract.params):
    if 'blocks' not in jax.tree_util.keystr(path) and 'layers' not in jax.tree_util.keystr(path):
      continue
    cuts = {axis for axis in x.sharding.spec if axis is not None}
    layers = x.shape[0] if len(x.sharding.spec) == len(x.shape) and len(x.shape) > 1 else 1
    if cuts & share_tokens:
      gathered += x.size * FLOAT // layers
    beside += int(_share(x) * (BESIDE_SHARED if share_tokens - cuts else BESIDE))
  return [Part("a layer's parameters, whole", gathered, ('backward',),
               'mesh.model larger, with a layout that cuts heads and mlp'),
          Part('gradients beside their sums', beside, ('backward',), WIDER)]


def _of_loss(a: assembly.Assembly) -> list[Part]:
  p, layout = a.parts, a.layout
  rows, T = _tokens(a)
  D, V = a.model_config.embed_dim, a.model_config.vocab_size
  V = V // layout.size('vocab') if V % layout.size('vocab') == 0 else V
  chunk = min(p.loss.chunk or T, T)
  return [
      Part('logits of a chunk', LOGITS * rows * chunk * V * FLOAT, ('loss',), 'loss.chunk smaller'),
      Part('table and its gradient', V * D * (_width(a) + 2 * FLOAT), ('loss',),
           'model.vocab_size smaller, or mesh.model larger'),
      Part("gradient of the last layer's output", rows * T * D * _width(a), ('loss', 'backward'))]


def _of_keys(a: assembly.Assembly) -> list[Part]:
  """Keys and values of other devices, and their gradients on the way home."""
  model, layout = a.model_config, a.layout
  n = layout.size('length')
  if n == 1 or not hasattr(model, 'num_kv_heads'):
    return []
  rows, T = _tokens(a)
  heads = model.num_kv_heads // layout.size('kv_heads')
  one = 2 * rows * T * heads * model.head_dim
  if a.parts.mesh.strategy in ('allgather', 'ulysses'):   # the layer keeps them, and is counted so
    return []
  return [Part('keys and values on the way', 2 * one * (_width(a) + FLOAT), ('backward',))]


# What the forward pass keeps, from the model itself.


def _quick_to_trace(config: Any) -> Any:
  """The config with the dense form of attention, of which every form keeps the same arrays."""
  config = config.copy_and_resolve_references()
  # Policies that look for products look into attention, too.
  if 'attention' in config.model and not config.model.get('remat', 'none').startswith('dots'):
    config.model.attention = 'reference'
  return config


class Saved(NamedTuple):
  activations: int      # bytes of one device
  parameters: int       # the same, of parameters in a form of their own


def residuals(a: assembly.Assembly, times: int = 1) -> list[jax.ShapeDtypeStruct]:
  """What the model's forward pass keeps for its backward pass, of `times` the whole batch."""
  def hidden(params, batch):
    return nnx.merge(a.graphdef, params)(batch['tokens'], None, **step.model_inputs(batch))[0]

  def pull(params, batch):
    return jax.vjp(functools.partial(hidden, batch=batch), params)[1]

  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (times * x.shape[0], *x.shape[1:]), x.dtype, sharding=x.sharding), a.abstract_batch())
  return jax.tree.leaves(jax.eval_shape(mesh.under(a.layout, pull), a.abstract.params, batch))


def saved(a: assembly.Assembly, most_of_mlp: int = 0) -> Saved:
  """`most_of_mlp`: count so many arrays as wide as the MLP at most (0: all)."""
  params = jax.tree.leaves(a.abstract.params)
  own = {(x.size, x.dtype) for x in params}
  fraction = sum(map(_share, params)) / sum(x.size * FLOAT for x in params)
  activations = forms = wide = 0
  for x, twice in zip(residuals(a), residuals(a, 2), strict=True):
    size = x.size * x.dtype.itemsize
    if twice.size > x.size:   # of tokens, and not of parameters: it grows with the rows
      of_mlp = most_of_mlp > 0 and x.shape[-1] == a.model_config.mlp_dim
      wide += of_mlp
      if not of_mlp or wide <= most_of_mlp:
        activations += size // _cuts(x.shape, a) // a.parts.run.accumulate
    elif (x.size, x.dtype) not in own:
      forms += int(size * fraction)
  return Saved(activations, forms)


def _cuts(shape: tuple[int, ...], a: assembly.Assembly) -> int:
  """Into how many parts the mesh cuts an activation of this shape."""
  layout = a.layout
  cuts = layout.size('batch') * layout.size('length')
  for field, dim in (('num_heads', 'heads'), ('num_kv_heads', 'kv_heads'), ('mlp_dim', 'mlp')):
    if getattr(a.model_config, field, 0) in shape[2:]:
      return cuts * layout.size(dim)
  return cuts


def one_layer(config: Any, devices: list | None) -> int:
  """Bytes of one device that a layer keeps without remat: two periods' less one's."""
  p = parts(config)
  period = getattr(p.model, 'period', 1)

  def kept(times: int) -> int:
    c = config.copy_and_resolve_references()
    c.model.num_layers = period * times
    if 'remat' in c.model:
      c.model.remat = 'none'
    # Of what lies between an MLP's two products XLA makes again what costs no product.
    most = {'swiglu': 3, 'gelu': 2}.get(getattr(p.model, 'mlp', ''), 0)
    stacked = getattr(p.model, 'layer_loop', 'unrolled') == 'scan'
    most *= period if stacked else period * times
    return saved(assembly.assemble(c, devices), most).activations

  return (kept(2) - kept(1)) // period
