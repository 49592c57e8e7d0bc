"""An encoder-decoder that says of a text of news who announced what, and nothing else.

Command:  python -m longctx.main --config=configs/summarise.py --workdir=runs/summarise
Debug:    python -m longctx.main --config=configs/summarise.py:debug --workdir=runs/debug
Expected: all of 512 held-out texts summarised right; 3 % after 1,000 steps, 90 % after 1,500. Some twelve minutes of
          a core.
Last checked: to its end, eead119
Use:      python -m longctx.generate --workdir=runs/summarise --source_file=news.txt --temperature=0 --max_new_tokens=47
Your own: --config.data.corpus=files --config.data.generator= --config.data.files='PAIRS/*.tsv' (text TAB summary)
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('encoder_decoder')
  config.data.form = 'pairs'
  config.data.corpus = 'generated'
  config.data.generator = 'summarise'
  config.data.long_documents = 'drop'   # an example is a row or is left out
  config.data.length = config.model.max_length = 48
  config.data.source_length = config.model.source_length = 448
  config.data.batch_size = 16
  config.model.num_layers = 2
  config.model.embed_dim = 96
  config.model.num_heads = 4
  config.model.position = 'rope'
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 1e-3   # at 3e-3 the encoder is soon the same for all texts, and nothing is read
  config.optimizer.warmup_steps = 100
  config.optimizer.beta2 = 0.98
  config.mesh.layout = 'single'
  config.run.num_steps = 3000
  config.run.log_every = 50
  config.run.eval_every = 500
  config.run.checkpoint_every = 250
  config.perplexity.batch_size = 32
  config.perplexity.segment = 48
  if variant == 'debug':
    config.data.batch_size = 4
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
