"""The device mesh, and the one table that says which dimension is cut over which of its axes.

Model code names the meaning of a dimension ('embed', 'heads', ...); a row of `RULES` maps meanings
to the mesh axes `data`, `seq` and `model`. An axis of size 1 cuts nothing and costs nothing.
Held by: tests/test_mesh.py (the loss is the same under every layout), tests/test_distributed.py.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from longctx.errors import ConfigError, check, check_choice, check_range
from longctx.parallel import layouts, neighbours

AXES = ('data', 'seq', 'model')
STRATEGIES = ('allgather', 'ring', 'bidirectional', 'ulysses', 'hybrid')   # parallel/sequence.py

# meaning of a dimension -> mesh axis. These are cut where the axis divides them, else kept whole.
MAY_STAY_WHOLE = ('vocab', 'kv_heads', 'slots')

RULES = {
    'single':        dict(batch=None,   length=None,  slots=None,  embed=None,   heads=None,    kv_heads=None,    mlp=None,    recurrent=None,    vocab=None),
    'data':          dict(batch='data', length=None,  slots=None,  embed=None,   heads=None,    kv_heads=None,    mlp=None,    recurrent=None,    vocab=None),
    'fsdp':          dict(batch='data', length=None,  slots=None,  embed='data', heads=None,    kv_heads=None,    mlp=None,    recurrent=None,    vocab=None),
    'tensor':        dict(batch='data', length=None,  slots=None,  embed='data', heads='model', kv_heads='model', mlp='model', recurrent='model', vocab='model'),
    'sequence':      dict(batch='data', length='seq', slots='seq', embed='data', heads='model', kv_heads='model', mlp='model', recurrent='model', vocab='model'),
    'sequence_fsdp': dict(batch='data', length='seq', slots='seq', embed='seq',  heads='model', kv_heads='model', mlp='model', recurrent='model', vocab='model'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Mesh sizes and the row of `RULES`. data=-1 takes the devices that seq and model leave."""

  data: int = -1
  seq: int = 1
  model: int = 1
  layout: str = 'tensor'
  strategy: str = 'ring'         # how attention crosses `seq`: 'auto' or one of STRATEGIES
  ulysses: int = 1               # devices that share heads in strategy='hybrid'; the ring has the rest
  order: str = 'contiguous'      # of the tokens over `seq`: see parallel/layouts.py
  unit: int = layouts.UNIT       # tokens of a stripe in order='striped'

  def __post_init__(self):
    check(self.data == -1 or self.data >= 1,
          f'mesh.data={self.data}: must be at least 1, or -1 for all remaining devices')
    check_range('mesh.seq', self.seq, 1)
    check_range('mesh.model', self.model, 1)
    check_choice('mesh.layout', self.layout, RULES)
    check_choice('mesh.strategy', self.strategy, ('auto', *STRATEGIES))
    check_choice('mesh.order', self.order, layouts.ORDERS)
    check_range('mesh.unit', self.unit, 1)
    if self.strategy == 'hybrid':
      degrees = [u for u in range(2, self.seq) if self.seq % u == 0]
      check(self.ulysses in degrees, f"mesh.ulysses={self.ulysses}: with mesh.strategy='hybrid' it "
            f'must divide mesh.seq={self.seq} and leave a ring of at least 2; '
            + (f'one of {", ".join(map(str, degrees))}' if degrees else 'a larger mesh.seq'))
    else:
      check(self.ulysses == 1, f'mesh.ulysses={self.ulysses}: is read with '
            f"mesh.strategy='hybrid' only, not {self.strategy!r}")
    used = set(RULES[self.layout].values())
    for axis in AXES:
      size = getattr(self, axis)
      fits = [name for name, row in RULES.items() if axis in row.values()]
      check(axis in used or size in (1, -1),
            f'mesh.{axis}={size}: layout {self.layout!r} cuts nothing over {axis!r}; '
            f'set mesh.layout to one of {", ".join(fits)}')


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh with its rules: what `NamedSharding` a tensor of named dims gets."""

  mesh: Mesh
  rules: dict[str, str | None]
  strategy: str = 'ring'
  ulysses: int = 1               # devices of `seq` that share heads
  order: str = 'contiguous'
  unit: int = layouts.UNIT
  overlap: bool = False          # whether transfers go on while the devices compute

  def __hash__(self) -> int:
    return hash((self.mesh, tuple(self.rules.items()), self.strategy, self.ulysses, self.order,
                 self.unit, self.overlap))

  def spec(self, *dims: str | None, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """PartitionSpec of a tensor whose dims have these meanings (None: not cut)."""
    axes = []
    for i, dim in enumerate(dims):
      if dim is not None and dim not in self.rules:
        raise KeyError(f'unknown dimension name {dim!r}; RULES has {", ".join(self.rules)}')
      axis = self.rules[dim] if dim is not None else None
      if dim in MAY_STAY_WHOLE and axis and (shape is None or shape[i] % self.mesh.shape[axis]):
        axis = None
      axes.append(axis)
    return PartitionSpec(*axes)

  def sharding(self, *dims: str | None, shape: tuple[int, ...] | None = None) -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(*dims, shape=shape))

  def size(self, dim: str) -> int:
    """Into how many parts this layout cuts dimension `dim`."""
    axis = self.rules[dim]
    return self.mesh.shape[axis] if axis else 1

  def params_sharding(self, params: Any) -> Any:
    """Shardings for a tree of `nnx.Param`s, from the `dims` each was created with.

    A stacked parameter has one leading dim more than its `dims` name: the layer, never cut.
    Raises ConfigError where a mesh axis does not divide a parameter.
    """
    def one(path, param):
      shape = param.get_value().shape
      dims = param.get_metadata()['dims']
      dims = (None,) * (len(shape) - len(dims)) + tuple(dims)
      spec = self.spec(*dims, shape=shape)
      for dim, size, axis in zip(dims, shape, spec):
        cuts = self.mesh.shape[axis] if axis else 1
        check(size % cuts == 0,
              f'mesh.{axis}={cuts}: must divide {dim}={size} of parameter '
              f'{jax.tree_util.keystr(path)}; choose a mesh.{axis} that divides it, or a layout '
              f'that leaves {dim} whole')
      return NamedSharding(self.mesh, spec)

    from flax import nnx
    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

  def host_rows(self, batch_size: int) -> tuple[int, int]:
    """(index, count): this host reads the index-th of `count` equal parts of a batch's rows."""
    rows = self.sharding('batch').addressable_devices_indices_map((batch_size,))
    spans = {(s[0].start or 0, batch_size if s[0].stop is None else s[0].stop)
             for s in rows.values()}
    start, stop = min(s for s, _ in spans), max(e for _, e in spans)
    return start // (stop - start), batch_size // (stop - start)

  def place(self, rows: Any, batch_size: int) -> Any:
    """Host arrays [B_host, T, ...] -> global arrays [B, T, ...] cut over batch and length."""
    first = self.host_rows(batch_size)[0]

    def one(x):
      x = np.asarray(x)
      offset = first * x.shape[0]
      dims = ('batch', 'length')[:x.ndim] + (None,) * (x.ndim - 2)
      def part(index):
        span = range(batch_size)[index[0]]
        return x[(slice(span.start - offset, span.stop - offset), *index[1:])]
      return jax.make_array_from_callback((batch_size, *x.shape[1:]), self.sharding(*dims), part)

    return jax.tree.map(one, rows)

  def lays_out(self, length: int) -> bool:
    """Whether rows of this length are put in another order or padded over the devices."""
    size = self.size('length')
    return size > 1 and (self.order != 'contiguous' or length % size != 0)

  def lay_out(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of host rows [B, T] in the order of its tokens over `seq`; see layouts.lay_out."""
    if not self.lays_out(next(iter(batch.values())).shape[1]):
      return batch
    return layouts.lay_out(batch, self.order, self.size('length'), self.unit)

  def replicate(self, tree: Any) -> Any:
    """Host values -> arrays that every device holds whole."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), self.sharding(), lambda index: np.asarray(x)[index]), tree)


def make_layout(config: Config, devices: list | None = None) -> Layout:
  """Builds the mesh over all devices (or those given); ConfigError where sizes do not fit."""
  given = devices is not None
  devices = devices if given else jax.devices()
  if config.layout == 'single':
    check(given or jax.process_count() == 1, "mesh.layout='single': one device cannot serve the "
          f"{jax.process_count()} processes of this run; set mesh.layout='data', or start one")
    devices = devices[:1]
  rest = config.seq * config.model
  data = config.data if config.data > 0 else max(1, len(devices) // rest)
  sizes = (data, config.seq, config.model)
  product = math.prod(sizes)
  check(product == len(devices),
        f'mesh.data={config.data} x mesh.seq={config.seq} x mesh.model={config.model}: '
        f'{product} places for {len(devices)} device(s); the product must be equal to it')
  if config.seq > 1 and config.model == 1:
    devices = neighbours.in_cycles(devices, data)
  mesh = Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
  ulysses = {'ulysses': config.seq, 'hybrid': config.ulysses}.get(config.strategy, 1)
  return Layout(mesh, RULES[config.layout], strategy=config.strategy, ulysses=ulysses,
                order=config.order, unit=config.unit,
                overlap=mesh.devices.flat[0].platform != 'cpu')


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


def current() -> Layout | None:
  """The layout that the code being traced runs under, or None."""
  return _current.get()


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
  """Code traced inside sees `layout` in `constrain` and in sequence-parallel attention."""
  token = _current.set(layout)
  try:
    with jax.set_mesh(layout.mesh):
      yield
  finally:
    _current.reset(token)


def under(layout: Layout, function: Callable) -> Callable:
  """`function`, traced and called under `layout`; jit the result."""
  def wrapped(*args, **kwargs):
    token = _current.set(layout)
    try:
      return function(*args, **kwargs)
    finally:
      _current.reset(token)
  return wrapped


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """Cuts an activation by its dims' meanings under the current layout; identity without one.

  Tokens that the devices cannot share evenly (one at a time) stay whole.
  """
  layout = current()
  if layout is None or layout.mesh.size == 1:
    return x
  dims = tuple(None if dim == 'length' and n % layout.size(dim) else dim
               for dim, n in zip(dims, x.shape, strict=True))
  return jax.lax.with_sharding_constraint(x, layout.sharding(*dims, shape=x.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, kept: tuple[str | None, ...], used: tuple[str | None, ...]) -> jax.Array:
  """A parameter, `kept` cut, as it is `used`; its gradient is summed to the parts that are kept.

  The gradient of `constrain` would be gathered like its argument: a sum of whole gradients.
  """
  del kept
  return constrain(x, *used)


gathered.defvjp(lambda x, kept, used: (constrain(x, *used), None),
                lambda kept, used, _, gradient: (constrain(gradient, *kept),))


def summed(x_XR: jax.Array, *dims: str | None) -> jax.Array:
  """The sum of a parameter's gradients [X, R, ...], one of each shard of batch and length, cut as the parameter is.

  First over the axis that the parameter is cut over, each device keeping a part, and then that part over the
  other: of a sum over both at once a compiler makes one of whole gradients, and cuts them afterwards.
  """
  layout = current()
  axes = {layout.rules.get(dim) for dim in dims} - {None} if layout else set()
  cut = [dim for dim in ('batch', 'length') if layout and layout.rules[dim] in axes]
  if cut == ['batch']:
    return constrain(constrain(x_XR.sum(0), 'length', *dims).sum(0), *dims)
  if cut == ['length']:
    return constrain(constrain(x_XR.sum(1), 'batch', *dims).sum(0), *dims)
  return constrain(x_XR.sum((0, 1)), *dims)


def compiler_options(layout: Layout) -> dict[str, str] | None:
  """What a training step is compiled with besides the defaults; None where nothing is to gain.

  On CPU: full-width vectors, which make exp and silu 1.5 to 2 times as fast where the processor
  has AVX-512, and Eigen's matrix products, a fifth faster than YNNPACK's at these sizes, which
  keeps the reductions (experiments/00_speed_of_one_device). On TPU: a scheduler that lets kernels
  and products hide transfers, and counts no element-wise pass as such: a hop's transfer then begins
  before its kernel and not with the merge after it (tests/test_ring_tpu.py).
  """
  platform = layout.mesh.devices.flat[0].platform
  if platform == 'tpu' and layout.size('length') > 1:
    return {'xla_lhs_loop_fusion_latency_multiplier': '0'}
  if platform != 'cpu':
    return None
  return {'xla_cpu_prefer_vector_width': '512',
          'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def has_host_memory(layout: Layout) -> bool:
  """Whether the devices have a memory of their own and reach another, the host's."""
  device = layout.mesh.devices.flat[0]
  kinds = getattr(device, 'addressable_memories', None)   # not of a stand-in, which is a TPU
  return device.platform != 'cpu' and (
      kinds is None or 'pinned_host' in [memory.kind for memory in kinds()])


def check_divides(field: str, value: int, dim: str, layout: Layout) -> None:
  """ConfigError unless the layout's axis for `dim` divides `value`."""
  axis, cuts = layout.rules[dim], layout.size(dim)
  if value % cuts:
    divisors = [str(n) for n in range(1, value + 1) if value % n == 0]
    raise ConfigError(
        f'{field}={value}: mesh.{axis}={cuts} must divide it; choose mesh.{axis} from '
        f'{", ".join(divisors[:12])}, or let {field} be a multiple of {cuts}')
