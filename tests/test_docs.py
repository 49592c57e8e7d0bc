"""The commands of docs/ are ones that run; its texts are in the words of the tasks they stand for."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from longctx import chat, command_line, contexts, generate, main, report
from longctx.data.tasks import needles, ruler_prompts
from longctx.data.tasks.example import example
from longctx.data.tokenizer import Bytes

ROOT = pathlib.Path(__file__).parent.parent


def commands(path):
  """Lists of words, what comes through a pipe left out; a command may go over several lines."""
  text = (ROOT / path).read_text().replace('\\\n', ' ')
  lines = [line.strip() for line in text.splitlines() if line.startswith('    ')]
  return [line for line in lines if 'python -m longctx' in line]


def test_the_commands_are_read_without_a_mistake(monkeypatch):
  monkeypatch.chdir(ROOT)
  found = commands('docs/applied.md')
  assert len(found) >= 12
  for line in found:
    python, dash_m, module, *args = shlex.split(line.rpartition('| ')[2])
    assert (python, dash_m) == ('python', '-m')
    if module == 'longctx.main':
      table, _ = command_line.parse_with_config(main.define_flags, ['main', *args])
      main.check_flags(table)
    elif module == 'longctx.contexts':
      contexts.parse(['contexts', *args])
    elif module == 'longctx.generate':
      generate.parse(['generate', *args])
    elif module == 'longctx.report':
      command_line.parse_flags(report.define_flags(), ['report', *args])
    else:
      assert module == 'longctx.chat'
      command_line.parse_flags(chat.define_flags(), ['chat', *args])


def test_the_texts_are_in_the_words_of_their_tasks():
  """As chat joins them with the line that is asked: '\\n' and the line."""
  asked = {re.search(r"echo '(.*?)' \|", line)[1] for line in commands('docs/applied.md') if "echo '" in line}
  towns = (ROOT / 'docs/towns.txt').read_text()
  question, = [line for line in asked if line.startswith('Question: ')]
  assert towns.startswith(ruler_prompts.QA[0]) and f'{towns}\n{question}'.endswith(
      ruler_prompts.QA[1].format(query='On which river does Gotrokilt lie?'))
  passkey = (ROOT / 'docs/passkey.txt').read_bytes() + needles.PASSKEY_QUESTION
  assert needles.PASSKEY_QUESTION[1:].decode() in asked
  assert passkey == example('passkey', needles.TASKS['passkey'], Bytes(), length=320, index=7, depth=0.4).prompt
  for name in ('towns', 'passkey'):
    assert f'/read docs/{name}.txt' in asked


@pytest.mark.slow
@pytest.mark.parametrize('config, begins', [('question_answering', 'runs/questions'), ('passkey', 'runs/passkey')])
def test_the_commands_run_with_the_debug_variants(config, begins, tmp_path):
  for line in commands('docs/applied.md'):
    if begins not in line and not ('contexts fork' in line and config == 'question_answering'):
      continue
    line = line.replace(f'configs/{config}.py', f'configs/{config}.py:debug').replace('samples=200', 'samples=4')
    line = line.replace('python -m', f'{shlex.quote(sys.executable)} -m').replace('runs/', f'{tmp_path}/')
    line = line.replace('--store=contexts', f'--store={tmp_path}/contexts')
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, (line, done.stderr[-2000:])
