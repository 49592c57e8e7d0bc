"""A transformer at 32,768 tokens of context, the sequence cut over eight devices by a ring.

Command:  JAX_NUM_CPU_DEVICES=8 python -m longctx.main --config=configs/ring_32k.py --workdir=runs/ring_32k
          (eight virtual devices of a CPU; without the variable, eight GPUs or TPU chips)
Debug:    JAX_NUM_CPU_DEVICES=8 python -m longctx.main --config=configs/ring_32k.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.corpus = 'stdlib'
  config.data.length = config.model.max_length = 32_768
  config.data.batch_size = 1
  config.mesh.data = 1
  config.mesh.seq = 8
  config.mesh.layout = 'sequence'
  config.mesh.strategy = 'ring'
  config.mesh.order = 'striped'   # documents are packed: zigzag would balance badly
  config.model.num_layers = 4
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.rope_base = 500_000.0
  config.model.remat = 'full'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 20
  config.run.num_steps = 200
  config.run.log_every = 5
  config.run.eval_every = 100
  config.run.checkpoint_every = 50
  config.perplexity.batch_size = 1
  config.perplexity.max_tokens = 131_072
  config.perplexity.segment = 4096
  if variant == 'debug':
    config.data.length = config.model.max_length = 1000   # padded to 1024
    config.mesh.unit = 16
    config.model.num_layers = 2
    config.model.embed_dim = 32
    config.optimizer.warmup_steps = 2
    config.run.num_steps = 8
    config.run.log_every = 2
    config.run.eval_every = 4
    config.run.checkpoint_every = 4
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 256
  return config
