"""Llama-3-8B's shape at 1,048,576 tokens of context on 64 chips of TPU v5e, by a ring of 64.

Source:   Llama 3, arXiv:2407.21783, table 3: 32 layers, d 4096, 32 heads of 128 that share 8 of
          keys, SwiGLU 14336, 128256 symbols, rope base 500000. A row is one document of a book's
          length or longer; give a tokenizer of your own (data.tokenizer) and files (data.files).
Command:  python -m longctx.main --config=configs/ring_1m_v5e.py --mode=compile --topology=v5e:8x8
          (to train, on 64 chips: --workdir=runs/1m in place of --mode and --topology)
Debug:    python -m longctx.main --config=configs/ring_1m_v5e.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.length = config.model.max_length = 2**20
  config.data.batch_size = 1
  config.model.vocab_size = 128256
  config.model.num_layers = 32
  config.model.embed_dim = 4096
  config.model.num_heads = 32
  config.model.num_kv_heads = 8
  config.model.mlp_dim = 14336
  config.model.mlp_block = 4096   # else its activations need more than attention
  config.model.rope_base = 500_000.0
  config.model.norm_epsilon = 1e-5
  config.model.tied = False
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.loss.chunk = 512
  config.optimizer.learning_rate = 3e-5
  config.optimizer.warmup_steps = 100
  config.mesh.layout = 'sequence_fsdp'
  config.mesh.seq = 64
  config.mesh.strategy = 'ring'
  config.mesh.order = 'zigzag'
  config.run.num_steps = 1000
  config.run.checkpoint_every = 50
  config.perplexity.segment = 65_536
  config.perplexity.batch_size = 1
  config.perplexity.modes = ('full',)
  if variant == 'debug':
    config.data.length = config.model.max_length = 128
    config.model.num_layers = 2
    config.model.embed_dim = 32
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.mlp_dim = 64
    config.model.mlp_block = 48
    config.model.vocab_size = 257
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.mesh.seq = 1
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.checkpoint_every = 10
    config.perplexity.segment = 64
    config.perplexity.max_tokens = 4096
  return config
