"""The config of runs that last a second: 1 layer, width 16, rows of 16 tokens, 12 steps.

Variants: packed (the default), lstm (segments), windowed (segments through a sliding window), compressive
(segments of 4 tokens and a memory that learns to compress).
The corpus is the caller's: --config.data.files='FOLDER/*.txt' (`write_corpus` makes one) and
--config.data.cache_dir=FOLDER.
"""

import random
from pathlib import Path

from longctx.configuration import base


def get_config(variant: str = 'packed'):
  config = base({'lstm': 'lstm', 'compressive': 'memory'}.get(variant, 'decoder'))
  config.data.corpus = 'files'
  config.data.files = 'missing/*.txt'
  config.data.split = 'contiguous'
  config.data.validation_fraction = 0.1
  config.data.length = 16
  config.data.batch_size = 8
  config.data.form = 'packed' if variant == 'packed' else 'segments'
  config.model.num_layers = 1
  config.model.embed_dim = 16
  if variant == 'lstm':
    config.model.hidden_dim = 16
  elif variant == 'compressive':
    config.model.update(dict(num_heads=2, segment=4, short_term=4, long_term='compressive', memory_rate=2))
  else:
    config.model.num_heads = 2
    config.model.attention, config.model.layer_loop = 'reference', 'unrolled'   # compile soonest
    config.model.max_length = 16 if variant == 'packed' else 512
    config.model.window = (0,) if variant == 'packed' else (12,)
  config.optimizer.learning_rate = 0.03
  config.run.num_steps = 12
  config.run.log_every = 2
  config.run.eval_every = 6
  config.run.checkpoint_every = 4
  config.run.compilation_cache = 'none'
  config.run.save_patience = 0
  config.perplexity.segment = 16
  config.perplexity.modes = ('full',)
  return config


def write_corpus(folder: Path, documents: int = 6, words: int = 100) -> str:
  """Documents of a few words in random order; the glob that finds them."""
  folder.mkdir(parents=True, exist_ok=True)
  chance = random.Random(0)
  for i in range(documents):
    text = ' '.join(chance.choices(['alpha', 'beta', 'gamma', 'delta'], k=words + 7 * i))
    (folder / f'{i}.txt').write_text(text + '\n')
  return f'{folder}/*.txt'
