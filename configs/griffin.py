"""Griffin's pattern on a folder of books: two recurrent layers (RG-LRU), then local attention.

Its state does not grow: a document of any length is read, and carried on, in constant memory.

Source:   De et al. 2024, arXiv:2402.19427 (the pattern, MQA, window; widths are a small CPU's).
Command:  python -m longctx.main --config=configs/griffin.py --workdir=runs/griffin
          with --config.data.files='GLOB' where the books lie elsewhere
          Qwen3-Next's pattern instead, three gated delta rules to one full attention:
          --config.model.layers="('gated_delta','gated_delta','gated_delta','attention')"
          --config.model.num_layers=8 --config.model.window='(0,)' --config.data.form=packed
Debug:    python -m longctx.main --config=configs/griffin.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.corpus = 'files'
  config.data.files = '../shared/data/books/*.txt'
  config.data.validation_fraction = 0.15
  config.data.test_fraction = 0.1
  config.data.form = 'segments'
  config.data.length = 512
  config.data.batch_size = 8
  config.model.max_length = 65_536
  config.model.layers = ('rglru', 'rglru', 'attention')
  config.model.num_layers = 6
  config.model.embed_dim = 192
  config.model.num_heads = 4
  config.model.num_kv_heads = 1
  config.model.window = (512,)
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.mesh.layout = 'single'
  config.run.num_steps = 2000
  config.run.log_every = 20
  config.run.checkpoint_every = 250
  config.perplexity.max_tokens = 262_144
  config.perplexity.length = 8192
  config.perplexity.segment = 512
  if variant == 'debug':
    config.data.corpus, config.data.files = 'stdlib', ''
    config.data.length = 64
    config.model.num_layers = 3
    config.model.embed_dim = 48
    config.model.num_heads = 2
    config.model.window = (32,)
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
    config.perplexity.length = 256
    config.perplexity.segment = 64
  return config
