"""An encoder-decoder that translates: generated English into an invented language, or lines of your own.

Command:  python -m longctx.main --config=configs/translate.py --workdir=runs/translate
Debug:    python -m longctx.main --config=configs/translate.py:debug --workdir=runs/debug
Expected: 99.4 % of 512 held-out sentences wholly right, 99.99 % of their bytes. Some five minutes of a core.
Last checked: to its end, aeffb23
Use:      python -m longctx.generate --workdir=runs/translate --source='two old birds follow one fox' --temperature=0 --max_new_tokens=63
Your own: --config.data.corpus=files --config.data.generator= --config.data.files='PAIRS/*.tsv' (source TAB target)
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('encoder_decoder')
  config.data.form = 'pairs'
  config.data.corpus = 'generated'
  config.data.generator = 'translate'
  config.data.long_documents = 'drop'   # an example is a row or is left out
  config.data.length = config.model.max_length = 64
  config.data.source_length = config.model.source_length = 64
  config.data.batch_size = 32
  config.model.num_layers = 2
  config.model.embed_dim = 96
  config.model.num_heads = 4
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.beta2 = 0.98
  config.mesh.layout = 'single'
  config.run.num_steps = 1600
  config.run.log_every = 50
  config.run.eval_every = 400
  config.run.checkpoint_every = 200
  config.perplexity.batch_size = 64
  config.perplexity.segment = 64
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
    config.perplexity.max_tokens = 1000
  return config
