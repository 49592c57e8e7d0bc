"""nanoGPT's CPU recipe on tiny Shakespeare: 4 layers, 4 heads, d 128, block 64, batch 12, 2000 steps.

Source:   github.com/karpathy/nanoGPT, README, "I only have a macbook": validation loss 1.88 nats
          per character. The same split: the first 90 % of the file, then the last 10 %.
Command:  python -m longctx.main --config=configs/tinyshakespeare.py --workdir=runs/shakespeare
          with --config.data.files=PATH where the file lies elsewhere
Debug:    python -m longctx.main --config=configs/tinyshakespeare.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.corpus = 'files'
  config.data.files = '../shared/data/tinyshakespeare.txt'
  config.data.split = 'contiguous'
  config.data.validation_fraction = 0.1
  config.data.test_fraction = 0.0
  config.data.length = config.model.max_length = 64
  config.data.batch_size = 12
  config.model.num_layers = 4
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.beta2 = 0.99
  config.mesh.layout = 'single'
  config.run.num_steps = 2000
  config.run.log_every = 50
  config.run.checkpoint_every = 500
  config.perplexity.segment = 64
  config.perplexity.batch_size = 64
  if variant == 'debug':
    config.model.num_layers = 1
    config.model.embed_dim = 32
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
  return config
