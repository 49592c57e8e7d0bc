"""BERT on bytes: an encoder that guesses 15 % of the tokens, of the Python standard library's source.

Command:  python -m longctx.main --config=configs/bert.py --workdir=runs/bert
Debug:    python -m longctx.main --config=configs/bert.py:debug --workdir=runs/debug
Expected: 63.7 % of 20,285 hidden bytes of held-out files right, 1.35 nats a byte. Some four minutes of a core.
          With model.position=learned, as BERT has it, it learns in as many steps little more than how often each
          byte is: 36.8 %, 2.72 nats (the most frequent one alone is 31.0 %, their entropy 3.13 nats).
Last checked: to its end, aeffb23
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('encoder')
  config.data.form = 'masked'
  config.data.length = config.model.max_length = 128
  config.data.batch_size = 16
  config.model.num_layers = 4
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.mlp = 'gelu'
  config.model.position = 'rope'
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.beta2 = 0.98
  config.mesh.layout = 'single'
  config.run.num_steps = 1500
  config.run.log_every = 50
  config.run.eval_every = 500
  config.run.checkpoint_every = 250
  config.perplexity.batch_size = 32
  config.perplexity.segment = 128
  config.perplexity.max_tokens = 20_000   # hidden tokens that are scored
  if variant == 'debug':
    config.data.length = config.model.max_length = config.perplexity.segment = 64
    config.model.num_layers = 1
    config.model.embed_dim = 32
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.eval_every = 0
    config.run.checkpoint_every = 10
    config.optimizer.warmup_steps = 5
    config.perplexity.max_tokens = 500
  return config
