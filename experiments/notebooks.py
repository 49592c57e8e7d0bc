"""Writes experiments/*/colab.ipynb, one for each experiment below: `python experiments/notebooks.py`.

A notebook installs longctx on Colab, around the jax that is there, runs its experiment's command at the tier
that is chosen, and shows the tables and figures. It writes into a folder of its own, so that committed results
stay as they are.
Held by: tests/test_notebooks.py (as committed == as written here; each runs from a clean kernel).
"""

import json
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPOSITORY = 'longctx/longctx'   # owner/name on GitHub: where notebooks are opened and cloned from
# Folder -> what to run in it: a title and the arguments of run.py, behind --tier and --out.
NOTEBOOKS = {
    '01_cost_of_attention': (('Work and memory', ()),),
    '02_recurrences': (('Recall and state tracking', ('--part=tasks',)),
                       ('A long stream in constant memory', ('--part=stream',))),
    '03_memories': (('Recall, a pair a segment', ('--part=recall',)),
                    ('A passkey far beyond the training length', ('--part=passkey',))),
    '04_arena': (('Every model on the same trials', ()),),
}
# These read books too, where a glob of text files is given; without one they leave them out.
BOOKS = ('04_arena',)

INSTALL = """\
import importlib.metadata
import os
import subprocess
import sys
import tempfile


def install():
  from packaging.specifiers import SpecifierSet
  # jax and its plugins stay as the runtime has them, whatever asks for others: they fit the accelerator.
  has = {{(found.metadata['Name'] or '').replace('_', '-'): found.version for found in importlib.metadata.distributions()}}
  kept = {{name: has[name] for name in has if name in ('jax', 'jaxlib', 'libtpu') or name.startswith('jax-')}}
  if 'jax' in kept and not SpecifierSet('{jax}').contains(kept['jax'], prereleases=True):
    raise RuntimeError(f'jax=={{kept["jax"]}}: longctx needs jax{jax}; choose a runtime that has it, or install it with its '
                       "plugin (!pip install 'jax[cuda12]{jax}' for a GPU, jax[tpu] for a TPU, jax for neither), "
                       'restart the session and run this again')
  if not os.path.isdir('/content/longctx'):
    subprocess.run(['git', 'clone', '--depth=1', 'https://github.com/{repository}', '/content/longctx'], check=True)
  constraints = os.path.join(tempfile.mkdtemp(), 'kept.txt')
  with open(constraints, 'w') as file:
    file.writelines(f'{{name}}=={{version}}\\n' for name, version in kept.items())
  subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '-r', '/content/longctx/requirements.txt',
                  '-c', constraints], check=True)


if 'google.colab' in sys.modules:
  install()
here = '/content/longctx/experiments/{folder}' if 'google.colab' in sys.modules else os.getcwd()"""

TIER = """\
tier = 'smoke'  #@param {tiers}
out = None      # a folder to keep the results in; None: a temporary one
out = out or tempfile.mkdtemp()"""

GIVEN_BOOKS = """\

books = ''      #@param {type: 'string'}
# a glob of text files, such as /content/books/*.txt; '': that trial is left out"""

RUN = """\
from IPython.display import Image, display


def run(*arguments):
  command = [sys.executable, 'run.py', f'--tier={tier}', f'--out={out}', *arguments]
  with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
    for line in process.stdout:
      print(line, end='')
  if process.returncode:
    raise RuntimeError(f'{command} ended with status {process.returncode}')


shown = set()


def show_new_figures():
  for name in sorted(os.listdir(out)):
    if name.endswith('.png') and name not in shown:
      shown.add(name)
      display(Image(os.path.join(out, name)))"""

TIERS = {'01_cost_of_attention': ['smoke', 'cpu'], '02_recurrences': ['smoke', 'hour', 'cpu'],
         '03_memories': ['smoke', 'hour', 'cpu'], '04_arena': ['smoke', 'cpu', 'gpu']}


def versions(package: str) -> str:
  """What requirements.txt asks of a package, such as '>=1,<2'."""
  with open(os.path.join(ROOT, 'requirements.txt'), encoding='utf-8') as file:
    found, = (line.split('#')[0].strip().removeprefix(package) for line in file if re.match(rf'{package}[<>=]', line))
  return found


def title(folder: str) -> str:
  with open(os.path.join(ROOT, 'experiments', folder, 'README.md'), encoding='utf-8') as file:
    return file.readline().strip('# \n')


def notebook(folder: str) -> dict:
  """In the format of nbformat 4.5."""
  badge = (f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
           f'(https://colab.research.google.com/github/{REPOSITORY}/blob/main/experiments/{folder}/colab.ipynb)')
  with_books = GIVEN_BOOKS if folder in BOOKS else ''
  cells = [('markdown', f'# {title(folder)}\n\n{badge}\n\nThe questions, predictions and committed results: '
                        f'[README](README.md). `smoke` only shows that it runs; `cpu` takes hours on two cores.'),
           ('code', INSTALL.format(repository=REPOSITORY, folder=folder, jax=versions('jax'))),
           ('code', TIER.format(tiers=json.dumps(TIERS[folder])) + with_books), ('code', RUN)]
  for name, arguments in NOTEBOOKS[folder]:
    given = [*map(repr, arguments), *["*([f'--books={books}'] if books else [])"] * (folder in BOOKS)]
    cells += [('markdown', f'## {name}'), ('code', f'run({", ".join(given)})\nshow_new_figures()')]
  empty = dict(markdown={}, code=dict(execution_count=None, outputs=[]))
  return dict(
      cells=[dict(cell_type=kind, id=f'cell-{i}', metadata={}, **empty[kind],
                  source=text.splitlines(keepends=True)) for i, (kind, text) in enumerate(cells)],
      metadata=dict(colab=dict(provenance=[]),
                    kernelspec=dict(display_name='Python 3', language='python', name='python3'),
                    language_info=dict(name='python')),
      nbformat=4, nbformat_minor=5)


def text(folder: str) -> str:
  return json.dumps(notebook(folder), indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
  for name in NOTEBOOKS:
    with open(os.path.join(ROOT, 'experiments', name, 'colab.ipynb'), 'w', encoding='utf-8') as file:
      file.write(text(name))
