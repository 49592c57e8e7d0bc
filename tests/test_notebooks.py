"""The notebooks: as the table of experiments/notebooks.py writes them, and each runs from a clean kernel."""

import os
import pathlib

import pytest

from experiments import notebooks

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('folder', notebooks.NOTEBOOKS)
def test_the_committed_notebook_is_what_the_table_says(folder):
  path = ROOT / 'experiments' / folder / 'colab.ipynb'
  assert path.read_text(encoding='utf-8') == notebooks.text(folder), (
      'python experiments/notebooks.py writes it anew')


def execute(folder: str):
  import nbclient
  import nbformat
  book = nbformat.read(ROOT / 'experiments' / folder / 'colab.ipynb', as_version=4)
  nbformat.validate(book)
  client = nbclient.NotebookClient(
      book, timeout=900, kernel_name='python3', resources=dict(metadata=dict(
          path=str(ROOT / 'experiments' / folder))))
  client.execute(env=dict(os.environ, JAX_PLATFORMS='cpu'))
  outputs = [out for cell in book.cells if cell.cell_type == 'code' for out in cell.outputs]
  figures = [out for out in outputs if 'image/png' in out.get('data', {})]
  said = ''.join(out.get('text', '') for out in outputs)
  return said, figures


@pytest.mark.slow
def test_the_cost_of_attention_runs_from_a_clean_kernel():
  said, _ = execute('01_cost_of_attention')
  assert 'ring, 8 devices' in said


@pytest.mark.slow
@pytest.mark.parametrize('folder, word', [('02_recurrences', 'mqar'), ('03_memories', 'segment_rewrite'),
                                          ('04_arena', 'mean place')])
def test_it_runs_from_a_clean_kernel_and_shows_its_figures(folder, word):
  said, figures = execute(folder)
  assert word in said and figures
