"""An encoder that says of a text, byte by byte, whether its opinions are good or bad.

Command:  python -m longctx.main --config=configs/sentiment.py --workdir=runs/sentiment
Debug:    python -m longctx.main --config=configs/sentiment.py:debug --workdir=runs/debug
Expected: 99.8 % of 512 held-out texts right; 61 % after 500 steps, 79 % after 1,000, 98 % after 2,000, since the
          loss stays near a coin's, 0.69, for some hundreds of steps. Some eight minutes of a core.
Last checked: to its end, aeffb23
IMDb:     --config.data.corpus=files --config.data.generator= --config.data.files=PATH/aclImdb
          --config.data.long_documents=trim --config.data.length=1024 --config.model.max_length=1024
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('encoder')
  config.data.form = 'labels'
  config.data.corpus = 'generated'
  config.data.generator = 'sentiment'
  config.data.long_documents = 'drop'   # a text is a row or is left out
  config.data.length = config.model.max_length = 288
  config.data.batch_size = 32
  config.model.num_classes = 2
  config.model.num_layers = 2
  config.model.embed_dim = 64
  config.model.num_heads = 4
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.beta2 = 0.98
  config.mesh.layout = 'single'
  config.run.num_steps = 3000
  config.run.log_every = 50
  config.run.eval_every = 500
  config.run.checkpoint_every = 250
  config.perplexity.batch_size = 64
  config.perplexity.segment = 288
  if variant == 'debug':
    config.data.batch_size = 8
    config.model.num_layers = 1
    config.model.embed_dim = 32
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.eval_every = 0
    config.run.checkpoint_every = 10
    config.optimizer.warmup_steps = 5
    config.perplexity.batch_size = 8
    config.perplexity.max_tokens = 64
  return config
