"""A small byte-level transformer on the source of the running Python's standard library.

Command:  python -m longctx.main --config=configs/quickstart.py --workdir=runs/quickstart
Expected: validation 2.37 bits per byte after 1,000 steps (1 million tokens), in under 3 minutes on 2 cores.
Debug:    python -m longctx.main --config=configs/quickstart.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.length = 512
  config.data.batch_size = 2
  config.model.max_length = 512
  config.model.num_layers = 4
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 60
  config.optimizer.beta2 = 0.99
  config.mesh.layout = 'single'
  config.run.num_steps = 1000
  config.run.expect = ('loss (of one batch, so it jumps) 2.4 to 3.0 by step 100, 1.7 to 2.8 by 500, '
                       '1.2 to 2.1 at the end; held out 2.37 bits per byte')
  config.run.log_every = 50
  config.run.checkpoint_every = 250
  config.perplexity.modes = ('full',)   # all of the split: a part of it is too little for a curve
  if variant == 'debug':
    config.data.length = 64
    config.model.max_length = 64
    config.model.num_layers = 1
    config.model.embed_dim = 32
    config.run.num_steps = 20
    config.run.expect = ''
    config.run.log_every = 5
    config.run.checkpoint_every = 10
    config.optimizer.warmup_steps = 5
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 64
  return config
