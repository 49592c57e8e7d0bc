"""longctx's decoder and train step, as `longctx.train` compiles them: this side of the comparison.

    python longctx_model.py --length=256 --batch=12 [--devices=2]     # a worker, see worker.py

Fed with one fixed batch of one document a row, as the other side is; segment ids, positions and the
loss mask are given and used, as in training.
"""

import argparse
import functools
import os

import numpy as np
import worker


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  worker.add_arguments(parser)
  parser.add_argument('--devices', type=int, default=1,
                      help='CPU devices that share the cores, each with its rows of the batch')
  parser.add_argument('--mlp', default='swiglu', help='swiglu (8/3 D wide) or gelu (4 D)')
  parser.add_argument('--position', default='rope', help='rope or learned')
  args = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax
  jax.config.update('jax_num_cpu_devices', args.devices)
  from longctx import assembly
  from longctx.configuration import base
  from longctx.parallel import host_memory, mesh
  from longctx.training import step as step_lib

  host_memory.keep_freed_memory()
  config = base('decoder')
  config.data.length = config.model.max_length = args.length
  config.data.batch_size = args.batch
  config.model.vocab_size = args.vocab
  config.model.num_layers, config.model.num_heads = args.layers, args.heads
  config.model.embed_dim = args.dim
  config.model.mlp, config.model.position = args.mlp, args.position
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate, config.optimizer.beta2 = 1e-3, 0.99
  config.mesh.layout = 'data' if args.devices > 1 else 'single'
  a = assembly.assemble(config)
  update = functools.partial(step_lib.train_step, a.graphdef, a.tx, a.parts.loss,
                             a.parts.run.accumulate, a.parts.optimizer.ema)
  shardings = jax.tree.map(lambda x: x.sharding, a.abstract)
  compiled = jax.jit(mesh.under(a.layout, update), donate_argnums=0,
                     out_shardings=(shardings, a.layout.sharding()),
                     compiler_options=mesh.compiler_options(a.layout))
  tokens, targets = worker.batch(args)
  rows = lambda x: np.tile(x, (args.batch, 1))
  batch = a.layout.place(dict(
      tokens=tokens, targets=targets, loss_mask=np.ones(tokens.shape, np.float32),
      positions=rows(np.arange(args.length, dtype=np.int32)),
      segment_ids=np.ones(tokens.shape, np.int32),
      document_start=rows(np.arange(args.length) == 0)), args.batch)
  state = a.init()

  def step() -> float:
    nonlocal state
    state, metrics = compiled(state, batch)
    return float(metrics['loss'])

  worker.serve(step, sum(x.size for x in jax.tree.leaves(state.params)))


if __name__ == '__main__':
  main()
