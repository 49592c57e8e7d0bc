"""--mode=describe: what it prints of a model is what the model is."""

import re

import jax
import pytest
from flax import nnx

from longctx import configuration, main
from longctx.assembly import make_model

MODELS = {
    'pattern': dict(num_layers=6, embed_dim=16, num_heads=2, max_length=64, window=(16,),
                    layers=('rglru', 'rglru', 'attention')),
    'full': dict(num_layers=4, embed_dim=16, num_heads=2, num_kv_heads=1, max_length=64,
                 window=(0, 8), qk_norm=True),
    'lstm': dict(name='lstm', num_layers=2, embed_dim=8, hidden_dim=16),
}


def printed(model, capsys):
  override = [f'--config.model.{k}={v}' for k, v in model.items() if k != 'name']
  file = 'configs/lstm.py' if model.get('name') == 'lstm' else 'configs/quickstart.py'
  assert main.main(['main', f'--config={file}:debug', '--mode=describe', '--config.data.length=32',
                    *override]) == 0
  return capsys.readouterr().out


@pytest.mark.parametrize('name', MODELS)
def test_it_says_what_the_model_is(name, capsys):
  text = printed(MODELS[name], capsys)
  number = lambda pattern: int(re.search(pattern, text)[1].replace(',', ''))
  config = configuration.base(MODELS[name].get('name', 'decoder'))
  config.model.update(MODELS[name])
  resolved = configuration.parts(config).model.resolved(257)
  params = jax.eval_shape(lambda: nnx.state(make_model(resolved, jax.random.key(0))))
  assert number(r'([\d,]+) parameters') == sum(x.size for x in jax.tree.leaves(params))
  rows = [line.split() for line in text.splitlines() if line.rstrip().endswith((' P0', ' P2'))]
  of_layers = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(params)
                  if 'blocks' in jax.tree_util.keystr(path) or 'layers' in jax.tree_util.keystr(path))
  times = {'pattern': (4, 2), 'full': (2, 2), 'lstm': (1, 1)}[name]
  columns = [[int(x.replace(',', '')) for x in row[-5:-1]] for row in rows]
  assert sum(n * c[0] for n, c in zip(times, columns, strict=True)) == of_layers
  kept = number(r'state of a row: ([\d,]+) bytes')
  clock = 12
  assert kept == clock + 4 * sum(n * c[2] for n, c in zip(times, columns))
  if name == 'full':
    assert number(r'grows by ([\d,]+) bytes a token') == 4 * 2 * columns[0][3]
  else:
    assert 'does not grow' in text
  assert ('class P2: each step' if name == 'lstm' else 'class P0: token-parallel') in text


def test_layers_of_a_pattern_stand_together(capsys):
  text = printed(MODELS['pattern'], capsys)
  assert re.search(r'^0, 1, 3, 4 +rglru', text, re.M) and re.search(r'^2, 5 +attention, 16', text, re.M)
