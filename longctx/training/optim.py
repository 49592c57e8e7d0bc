"""Optimisers and schedules by name, what decays, clipping, averaged parameters, bad gradients.

    update = -lr(step) * (direction(clip(grad)) + weight_decay * param * [the param is a matrix])

for every optimiser: the name chooses the direction alone, so learning rate, decay and clipping mean
the same thing under all of them. Directions are optax's.

    adamw      m / (sqrt(v) + epsilon), bias-corrected           arXiv:1711.05101
    adafactor  factored v, update clipped to rms 1, no momentum  arXiv:1804.04235
    lion       sign(beta1 m + (1 - beta1) g)                     arXiv:2302.06675
    muon       orthogonalised momentum, rms 0.2 as Adam's        Jordan 2024, arXiv:2502.16982
    sgd        g + momentum * trace

Differs from the papers: adafactor's learning rate is absolute, not times the parameter's rms. Muon
takes each matrix of each layer, and of each head what its memory begins with, by itself; tables (embedding,
head, positions), norms, biases and the taps of convolutions go by adamw.
Held by: tests/test_optim.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from longctx.errors import check, check_choice, check_range

OPTIMIZERS = ('adamw', 'adafactor', 'lion', 'muon', 'sgd')
SCHEDULES = ('constant', 'cosine', 'linear', 'wsd', 'staircase')
GATE = 'gate'
NO_DECAY = ('scale', 'bias', GATE, 'start_b')  # names of what never decays, whatever its rank,
NO_DECAY_ENDS = ('_scale', '_bias')  # and their ends: norm_scale, u_bias and start_b are vectors of heads
NO_MATRIX = ('taps', 'table')  # of a convolution, a few numbers a channel; of embeddings, and biases by distance
MUON_RMS = 0.2  # rms of Muon's update: that of Adam's, so that one learning rate serves both


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  name: str = 'adamw'
  learning_rate: float = 1e-3  # at the peak
  schedule: str = 'cosine'
  warmup_steps: int = 0        # linear: step s < warmup_steps has (s + 1) / (warmup_steps + 1)
  decay_fraction: float = 0.2  # wsd: the last part of the run, over which the rate falls linearly
  final_fraction: float = 0.1  # of learning_rate, reached when num_steps are done
  decay_start: int = 0         # staircase: steps after the warm-up, and from then on the rate is
  decay_every: int = 1000      #   multiplied by decay_factor whenever so many more steps are done
  decay_factor: float = 0.5
  weight_decay: float = 0.1    # times the scheduled rate
  beta1: float = 0.9           # adamw, lion, and adamw inside muon
  beta2: float = 0.95
  epsilon: float = 1e-8
  momentum: float = 0.95       # muon, sgd
  clip_norm: float = 1.0       # of all gradients together; 0 = off
  ema: float = 0.0             # decay of the averaged parameters; 0 = none are kept
  gate_rate: float = 1.0       # times the rate, for parameters named `gate` (of memories)

  def __post_init__(self):
    check_choice('optimizer.name', self.name, OPTIMIZERS)
    check_choice('optimizer.schedule', self.schedule, SCHEDULES)
    for field in ('learning_rate', 'warmup_steps', 'weight_decay', 'clip_norm'):
      value = getattr(self, field)
      check_range(f'optimizer.{field}', value, low=0)
      check(math.isfinite(value), f'optimizer.{field}={value}: must be finite')
    for field in ('decay_fraction', 'final_fraction'):
      check_range(f'optimizer.{field}', getattr(self, field), low=0, high=1)
    check(0 < self.decay_factor <= 1,
          f'optimizer.decay_factor={self.decay_factor}: must be above 0 and at most 1')
    check_range('optimizer.decay_start', self.decay_start, low=0)
    check_range('optimizer.decay_every', self.decay_every, low=1)
    for field in ('beta1', 'beta2', 'momentum', 'ema'):
      value = getattr(self, field)
      check(0 <= value < 1, f'optimizer.{field}={value}: must be at least 0 and below 1')
    check(0 < self.gate_rate < math.inf,
          f'optimizer.gate_rate={self.gate_rate}: must be above 0 and finite')
    check(0 < self.epsilon < math.inf, f'optimizer.epsilon={self.epsilon}: must be above 0')


def make_schedule(config: Config, num_steps: int) -> optax.Schedule:
  """step (updates done so far) -> learning rate, for a run of `num_steps` updates."""
  warmup, peak = config.warmup_steps, config.learning_rate
  check(warmup < num_steps, f'optimizer.warmup_steps={warmup}: must be below the number of steps, '
        f'run.num_steps={num_steps}')
  final, rest = config.final_fraction * peak, num_steps - warmup
  if config.schedule == 'constant':
    schedule = optax.constant_schedule(peak)
  elif config.schedule == 'cosine':
    schedule = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
  elif config.schedule == 'linear':
    schedule = optax.linear_schedule(peak, final, rest)
  elif config.schedule == 'staircase':
    schedule = optax.exponential_decay(peak, config.decay_every, config.decay_factor,
                                       transition_begin=config.decay_start, staircase=True)
  else:  # wsd: warm-up, stable, decay
    decay = min(rest, round(config.decay_fraction * num_steps))
    schedule = optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(1, decay))],
        [rest - decay])
  if not warmup:
    return schedule
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, schedule], [warmup])


def make_optimizer(config: Config, num_steps: int, params: Any) -> optax.GradientTransformation:
  """Clip, direction, decay, learning rate. `params` may be abstract: only shapes and dims count."""
  direction = {
      'adamw': lambda: _adam(config),
      'adafactor': lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
      'lion': lambda: optax.scale_by_lion(config.beta1, config.beta2),
      'muon': lambda: _muon(config, params),
      'sgd': lambda: optax.trace(config.momentum) if config.momentum else optax.identity(),
  }[config.name]()
  parts = [clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  parts.append(direction)
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, map_params(decays, params)))
  if config.gate_rate != 1:
    parts.append(_gates_faster(config.gate_rate, params))
  return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config, num_steps)))


def _gates_faster(factor, params):
  """Gates that let a memory in are few numbers, and far from where they should be when one is added
  to a trained model: with a rate of their own, 30 times the others', it is used at all (2512.23862).
  """
  rates = map_params(lambda path, _: factor if last_name(path) == GATE else 1.0, params)
  def update(updates, params):
    del params
    return jax.tree.map(lambda x, rate: x * rate, updates, rates)
  return optax.stateless(update)


def _adam(config):
  return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _muon(config, params):
  # Put together here, not `optax.contrib.muon`: its Adam is Nesterov's and its decay reaches norms.
  dims = map_params(lambda *leaf: muon_dims(*leaf) or optax.MaskedNode(), params)
  labels = map_params(lambda *leaf: 'adam' if muon_dims(*leaf) is None else 'muon', params)

  def to_rms(updates, params):
    del params
    size = lambda x, axes: math.prod(x.shape[i] for i in axes)
    return jax.tree.map(
        lambda x, d: x * MUON_RMS * max(size(x, d.reduction_axis), size(x, d.output_axis)) ** 0.5,
        updates, dims)

  orthogonal = optax.contrib.scale_by_muon(beta=config.momentum, eps=config.epsilon,
                                           weight_dimension_numbers=dims)
  return optax.partition({'muon': optax.chain(orthogonal, optax.stateless(to_rms)),
                          'adam': _adam(config)}, labels)


# What a parameter is. Parameters are nnx.Params whose `dims` name each dim of their own; a stacked
# parameter has one dim more in front, its layer.


def _is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


def map_params(function, params):
  """function(path, param) over the parameters; the results stand where the arrays stood."""
  one = lambda path, param: param.replace(function(path, param))
  return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_param)


def path_name(path) -> str:
  """'layers/attention/w_q' of a key path."""
  keys = [str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in path]
  return '/'.join(keys[:-1] if keys[-1:] == ['value'] else keys)


def own_dims(path, param) -> tuple[str | None, ...]:
  dims = param.get_metadata().get('dims')
  stacked = -1 if dims is None else len(param.get_value().shape) - len(dims)
  if stacked not in (0, 1):
    raise ValueError(f'parameter {path_name(path)} has shape {param.get_value().shape} and '
                     f'dims={dims}: dims must name each dim but the leading layer of a stack.')
  return dims


def last_name(path) -> str:
  return path_name(path).split('/')[-1]


def decays(path, param) -> bool:
  """True for a matrix of a layer; False for norms and biases, stacked over layers or not."""
  name = last_name(path)
  kept = name in NO_DECAY or name.endswith(NO_DECAY_ENDS)
  return not kept and len(own_dims(path, param)) >= 2


def muon_dims(path, param) -> MuonDimensionNumbers | None:
  """Which dims make the rows and columns of the matrix that Muon orthogonalises; None: adamw.

  (..., 'embed') maps all else to embed; ('heads', ...) maps the second dim to the third, of each head by
  itself (what a memory begins with); anything else maps its first dim to all else. A nameless dim behind
  the first, as in ('embed', None, 'mlp'), counts matrices (gate and input, key and value, the gates of
  a cell): each is taken by itself, as each layer is.
  """
  dims = own_dims(path, param)
  if not decays(path, param) or last_name(path) in NO_MATRIX or 'vocab' in dims or dims == (None, 'embed'):
    return None   # the last two are tables: of symbols, of positions
  first, n = len(param.get_value().shape) - len(dims), len(dims)
  if dims[-1] == 'embed':
    rows, columns = range(n - 1), [n - 1]
  elif dims[0] == 'heads' and n == 3:
    rows, columns = [1], [2]
  else:
    rows, columns = [0], range(2 if n > 2 and dims[1] is None else 1, n)
  return MuonDimensionNumbers(tuple(first + i for i in rows), tuple(first + i for i in columns))


# Norms, averages, bad gradients.


def sum_of_squares(x: jax.Array) -> jax.Array:
  """float32. A dot product with itself, which a CPU sums in vectors; a plain reduction it sums one
  number at a time."""
  dims = tuple(range(x.ndim))
  return jax.lax.dot_general(x, x, ((dims, dims), ((), ())), preferred_element_type=jnp.float32)


def global_norm(tree: Any) -> jax.Array:
  """sqrt of the sum of all squares, float32."""
  return jnp.sqrt(sum(sum_of_squares(x) for x in jax.tree.leaves(tree)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales all updates by min(1, max_norm / norm): one product inside the optimiser's own pass."""
  def update(updates, state, params=None):
    del params
    scale = max_norm / jnp.maximum(global_norm(updates), max_norm)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state
  return optax.GradientTransformation(optax.init_empty_state, update)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
  """The averaged parameters after update number `step` (from 0) made `params`.

  ema_t = sum_i decay^(t-i) params_i / sum_i decay^(t-i) over the updates i = 0..t: Adam's bias
  correction, kept corrected. So the first average is the first parameters, the initial ones never
  count, and early averages run over all steps there were.
  """
  # New weight (1 - d) / (1 - d^(t+1)); expm1 keeps the digits that 1 - d^(t+1) loses near 0.
  done = jnp.asarray(step, jnp.float32) + 1
  weight = (1 - decay) / -jnp.expm1(done * math.log(decay))
  return jax.tree.map(lambda e, p: e + weight.astype(e.dtype) * (p - e), ema, params)


def nonfinite_by_group(tree: Any) -> dict[str, jax.Array]:
  """'layers/attention/w_q' -> whether any number of it is NaN or infinite. One pass: on demand."""
  return {path_name(path): ~jnp.isfinite(x).all()
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def first_bad_group(tree: Any) -> str:
  """Name of the first parameter group with a number that is not finite; '' if there is none."""
  bad = jax.device_get(jax.jit(lambda leaves: [~jnp.isfinite(x).all() for x in leaves])(
      jax.tree.leaves(tree)))
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return next((name for name, is_bad in zip(names, bad) if is_bad), '')
