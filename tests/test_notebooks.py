"""The notebooks: as the table of experiments/notebooks.py writes them, and each runs from a clean kernel."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import types

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


class Colab:
  """A runtime with these packages; what its shell was told to do, and what pip was told to keep."""

  def __init__(self, monkeypatch, packages, cloned=False, colab=True):
    self.commands, self.kept = [], None
    monkeypatch.setattr(subprocess, 'run', self.run)
    monkeypatch.setattr(importlib.metadata, 'distributions', lambda: [
        types.SimpleNamespace(metadata=dict(Name=name), version=version) for name, version in packages.items()])
    monkeypatch.setattr(os.path, 'isdir', lambda path: cloned)
    if colab:
      monkeypatch.setitem(sys.modules, 'google.colab', types.ModuleType('google.colab'))

  def run(self, command, check):
    assert check
    self.commands.append(command)
    if 'pip' in command:
      self.kept = pathlib.Path(command[command.index('-c') + 1]).read_text()

  def install(self, folder='04_arena'):
    cell, = [''.join(cell['source']) for cell in notebooks.notebook(folder)['cells'] if 'def install' in ''.join(cell['source'])]
    found = {}
    exec(cell, found)
    return found['here']


def test_on_colab_the_runtimes_jax_is_kept(monkeypatch):
  plugins = {'jaxlib': '0.10.1', 'jax_cuda12_plugin': '0.10.1', 'jax-cuda12-pjrt': '0.10.1', 'libtpu': '0.0.42'}
  colab = Colab(monkeypatch, {'jax': '0.10.2', **plugins, 'jaxtyping': '0.3', 'flax': '0.11', None: '1'})
  assert colab.install() == '/content/longctx/experiments/04_arena'
  clone, pip = colab.commands
  assert clone[:2] == ['git', 'clone'] and pip[1:-1] == ['-m', 'pip', 'install', '--quiet', '-r', '/content/longctx/requirements.txt', '-c']
  assert colab.kept == 'jax==0.10.2\njaxlib==0.10.1\njax-cuda12-plugin==0.10.1\njax-cuda12-pjrt==0.10.1\nlibtpu==0.0.42\n'
  again = Colab(monkeypatch, {'jax': '0.11.0.dev3'}, cloned=True)   # as after a clone whose installing failed
  again.install()
  assert [command[1] for command in again.commands] == ['-m'] and again.kept == 'jax==0.11.0.dev3\n'
  without = Colab(monkeypatch, {'numpy': '2.0'})
  without.install()
  assert without.kept == '' and len(without.commands) == 2


@pytest.mark.parametrize('version', ['0.7.2', '0.13.0'])
def test_a_runtime_whose_jax_will_not_do_is_left_as_it_is(version, monkeypatch):
  colab = Colab(monkeypatch, {'jax': version, 'jaxlib': version})
  with pytest.raises(RuntimeError) as caught:
    colab.install()
  said = str(caught.value)
  asked = notebooks.versions('jax')
  assert said.startswith(f'jax=={version}: longctx needs jax{asked}; ') and '\n' not in said
  assert f"!pip install 'jax[cuda12]{asked}'" in said and asked.startswith('>=') and not colab.commands


def test_elsewhere_nothing_is_installed(monkeypatch):
  colab = Colab(monkeypatch, {'jax': '0.7.2'}, colab=False)
  assert colab.install() == os.getcwd() and not colab.commands


@pytest.mark.slow
@pytest.mark.parametrize('folder, word', [('01_cost_of_attention', 'ring, 8 devices'), ('02_recurrences', 'mqar'), ('03_memories', 'segment_rewrite'),
                                          ('04_arena', 'mean place')])
def test_it_runs_from_a_clean_kernel_and_shows_its_figures(folder, word):
  said, figures = execute(folder)
  assert word in said and figures
