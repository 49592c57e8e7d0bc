"""One contender of run.py: prints a JSON line with its compiled memory, then one for each turn.

    python cost.py --name='ring, 8 devices' --length=16384     # then a line on stdin is a turn
"""

import argparse
import importlib.util
import json
import os
import sys
import time

HEADS, HEAD_DIM = 4, 64


def contenders():
  """name -> (devices, function of (q, k, v, mesh) under jit)."""
  return {'blockwise, 1 device': (1, blockwise), 'ring, 8 devices': (8, ring),
          'ringattention, 8 devices': (8, ringattention), 'jax.nn dense, 1 device': (1, dense),
          'jax.nn dense over 8 devices (GSPMD)': (8, dense)}


def blockwise(q, k, v, mesh):
  from longctx.attention import attention, intervals
  return attention(q, k, v, intervals.causal(q.shape[0], q.shape[1]), implementation='blockwise')


def ring(q, k, v, mesh):
  """Tokens in zigzag order, as the data stream lays them out."""
  import jax.numpy as jnp

  from longctx.attention import attention
  from longctx.attention.intervals import Intervals
  from longctx.parallel import layouts
  slots = layouts.permutation('zigzag', q.shape[1], 8)
  index = jnp.broadcast_to(jnp.asarray(slots, jnp.int32), q.shape[:2])
  mask = Intervals(start_BT=jnp.zeros_like(index), end_BT=index + 1, index_BT=index)
  return attention(q, k, v, mask, implementation='blockwise')


def ringattention(q, k, v, mesh):
  """haoliuhl/ringattention 0.1.2, its own default blocks, in a folder that PYTHONPATH names."""
  import jax
  from jax.sharding import PartitionSpec as P
  folder = next(p for p in sys.path if os.path.isfile(os.path.join(p, 'ringattention/__init__.py')))
  path = os.path.join(folder, 'ringattention/ringattention_jax.py')   # its __init__ fails on jax 0.10
  spec = importlib.util.spec_from_file_location('ringattention_jax', path)
  package = importlib.util.module_from_spec(spec)
  sys.modules['ringattention_jax'] = package   # its dataclasses look for it
  spec.loader.exec_module(package)
  settings = dict(causal_block_size=1, deterministic=True, dropout_rng=None, attn_pdrop=0.0,
                  query_chunk_size=min(512, q.shape[1] // 8),
                  key_chunk_size=min(512, q.shape[1] // 8),
                  policy=jax.checkpoint_policies.nothing_saveable,
                  dtype=q.dtype, precision=None, prevent_cse=True)
  local = lambda q, k, v: package.ring_attention(q, k, v, None, None, None, 'seq', True, settings)
  cut = P(None, 'seq', None, None)
  return jax.shard_map(local, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)(q, k, v)


def dense(q, k, v, mesh):
  import jax
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--name', required=True)
  parser.add_argument('--length', type=int, required=True)
  parser.add_argument('--memory_only', action='store_true')
  args = parser.parse_args()
  devices, attend = contenders()[args.name]
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax
  jax.config.update('jax_num_cpu_devices', devices)
  import jax.numpy as jnp
  import numpy as np

  from longctx.parallel import layouts
  from longctx.parallel import mesh as mesh_lib
  layout = mesh_lib.make_layout(mesh_lib.Config(
      data=1, seq=devices, layout='sequence' if devices > 1 else 'single'))
  sharding = layout.sharding('batch', 'length', None, None)
  gradient = jax.grad(lambda q, k, v: (attend(q, k, v, layout.mesh) ** 2).sum(), (0, 1, 2))
  shape = jax.ShapeDtypeStruct((1, args.length, HEADS, HEAD_DIM), jnp.float32, sharding=sharding)
  compiled = jax.jit(mesh_lib.under(layout, gradient), out_shardings=(sharding,) * 3,
                     compiler_options=mesh_lib.compiler_options(layout)).lower(*[shape] * 3).compile()
  temp = compiled.memory_analysis().temp_size_in_bytes
  print(json.dumps(dict(temp_bytes=temp)), flush=True)
  if args.memory_only:
    return
  slots = np.arange(args.length)
  if attend is ring:   # the same tokens, where the ring has them
    slots = layouts.permutation('zigzag', args.length, 8)
  qkv = [jax.device_put(jax.random.normal(key, shape.shape)[:, slots], sharding)
         for key in jax.random.split(jax.random.key(0), 3)]
  norm = jax.jit(lambda x: jnp.sqrt(sum((g ** 2).sum() for g in x)))
  jax.block_until_ready(compiled(*qkv))
  for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    gradients = jax.block_until_ready(compiled(*qkv))
    print(json.dumps(dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu,
                          gradient_norm=float(norm(gradients)))), flush=True)


if __name__ == '__main__':
  main()
