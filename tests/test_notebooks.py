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


def test_a_notebook_of_books_passes_them_on():
  cells = [''.join(cell['source']) for cell in notebooks.notebook('04_arena')['cells']]
  call, = [cell for cell in cells if cell.startswith('run(')]
  for books, passed in (('', ()), ('a/*.txt', ('--books=a/*.txt',))):
    calls = []
    exec(call, dict(books=books, run=lambda *args, calls=calls: calls.append(args), show_new_figures=lambda: None))
    assert calls == [passed]
  assert any(cell.endswith("\nbooks = ''      #@param {type: 'string'}\n# a glob of text files, such as "
                           "/content/books/*.txt; '': that trial is left out") for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize('folder, word', [('01_cost_of_attention', 'ring, 8 devices'), ('02_recurrences', 'mqar'), ('03_memories', 'segment_rewrite'),
                                          ('04_arena', 'mean place')])
def test_it_runs_from_a_clean_kernel_and_shows_its_figures(folder, word):
  said, figures = execute(folder)
  assert word in said and figures
