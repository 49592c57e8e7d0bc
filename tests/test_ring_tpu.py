"""The ring with the splash kernel, compiled for TPUs that are not here: no exchange is exposed.

The schedule is the compiler's own: an exchange is hidden when a kernel or a loop stands between its
start and its end.
"""

import jax
import jax.numpy as jnp
import pytest

from longctx.attention import attention
from longctx.attention.intervals import Intervals
from longctx.parallel import aot, hlo, hlo_exchanges, mesh

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 8, 2, 128, 4096   # tokens of a chip


def compiled_exchanges(devices: list, rings: int, order: str, backward: bool) -> list:
  chips = len(devices) // rings
  layout = mesh.make_layout(mesh.Config(data=rings, seq=chips, layout='sequence', order=order), devices)
  length = TOKENS * chips
  cut = layout.sharding('batch', 'length', 'heads', None)
  row = jax.ShapeDtypeStruct((rings, length), jnp.int32, sharding=layout.sharding('batch', 'length'))
  qkv = [jax.ShapeDtypeStruct((rings, length, heads, HEAD_DIM), jnp.bfloat16, sharding=cut)
         for heads in (HEADS, KV_HEADS, KV_HEADS)]

  def attend(q, k, v, start, index):   # the mask is data: packed documents, windows, any order
    return attention(q, k, v, Intervals(start_BT=start, end_BT=index + 1, index_BT=index))

  gradient = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))
  program = jax.jit(mesh.under(layout, gradient if backward else attend),
                    out_shardings=(cut,) * 3 if backward else cut,
                    compiler_options=mesh.compiler_options(layout))
  _, text = aot.compile_to_read(program.lower(*qkv, row, row))
  assert 'tpu_custom_call' in text   # splash, not tiles in plain JAX
  return hlo_exchanges.exchanges(hlo.parse(text), dict(layout.mesh.shape))


@pytest.mark.slow
@pytest.mark.parametrize('topology, rings', [
    ('v5e:2x4', 1), ('v5p:2x2x2', 1), ('v6e:2x4', 1), ('v5e:8x8', 1), ('v5e:4x4', 2), ('v5p:2x2x4', 2)])
def test_every_transfer_is_hidden(topology, rings, tpu_devices):
  """n chips of a ring: n - 1 sends of (k, v, index) forward; as many more, and of (dk, dv), backward."""
  hops = aot.check_topology(topology)[1] // rings - 1
  forward, both = (compiled_exchanges(tpu_devices(topology), rings, 'zigzag', backward) for backward in (False, True))
  sends = lambda found: sum(x.times for x in found if x.kind == 'collective-permute')
  assert sends(forward) == 3 * hops
  assert sends(both) == (3 + 3 + 2) * hops
  assert {x.kind for x in both} == {'collective-permute'}   # nothing is gathered
  assert not [x.name for x in forward + both if x.exposed]
