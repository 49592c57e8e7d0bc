"""W/report.html: what a run was found to be worth, on one page that needs nothing but itself.

The figures of tasks are files in W/figures too. Made from what stands in the workdir: tasks.jsonl
(the evaluation that was written last, see records.py), evaluation.json, metrics.jsonl, config.json.
Prompts are not stored but made again from their seeds, and shown only where their hash is that of
the prompt that was answered. What is missing is left out.
Held by: tests/test_report.py, tests/test_report_browser.py.
"""

import hashlib
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longctx.data.tasks import sources
from longctx.data.tasks.example import SOURCES, Example, example
from longctx.data.tasks.table import TASKS, floor
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.draw import accuracy, curve, heatmap
from longctx.errors import ConfigError, check
from longctx.evaluation import again, held_out_page, page, records, ruler_summary
from longctx.files import atomic_write

BANDS = 10      # of depth, where depths were drawn and not asked for
LINES = 10      # of a figure of accuracy; more tasks make more figures
# Of a line or of evaluation.json what tells which model and text it is of, and what made it.
IDENTITY = ('settings', 'checkpoint', 'step', 'use_ema', 'model', 'config', 'tokenizer', 'content', 'digests', 'versions', 'commit')


def write(folder: str, sections: Sequence[str] = ()) -> str:
  """Writes the report of a workdir; its path. `sections`: HTML that stands behind the examples."""
  path = Path(folder) / 'report.html'
  data = render(folder, sections)
  config, (lines, _) = _json(Path(folder) / 'config.json'), newest(lines_of(folder, 'tasks.jsonl'))
  try:
    for drawing in drawings(config, lines):
      path.with_name('figures').mkdir(exist_ok=True)
      file = io.BytesIO()
      drawing.draw(file)
      atomic_write(path.parent / 'figures' / f'{drawing.name}.png', file.getvalue())
    atomic_write(path, data)
  except OSError as e:
    raise ConfigError(f'{path}: cannot be written ({e.strerror}); make room, or let yourself write '
                      'there') from e
  return str(path)


def render(folder: str, sections: Sequence[str] = ()) -> bytes:
  """The page."""
  config = _json(Path(folder) / 'config.json')
  check(
    config is not None,
    f'--workdir={folder}: no run was started there (no config.json); give the workdir of a run',
  )
  held_out = _json(Path(folder) / 'evaluation.json')
  metrics, asked = lines_of(folder, 'metrics.jsonl'), lines_of(folder, 'tasks.jsonl')
  lines, others = newest(asked)
  check(
    bool(lines or held_out or metrics or sections),
    f'--workdir={folder}: nothing was measured there '
    'yet; train, or evaluate: python -m longctx.main --config=... --workdir=... --mode=eval',
  )
  name = Path(folder).resolve().name
  parts = [
    f'<h1>{page.text(name)}</h1>',
    page.paragraph(_about(config, lines, held_out), soft=True),
  ]
  if lines:
    parts += _tasks(config, lines, others)
    parts += [page.heading('Examples'), *_examples(config, lines)]
  parts += sections
  if held_out:
    parts += [page.heading('Held-out text'), *held_out_page.parts(held_out, (*IDENTITY, 'overrides'))]
  if any(m.get('loss') is not None for m in metrics):
    parts += [
      page.heading('Training'),
      page.figure(
        lambda file: curve.draw(metrics, file, title=f'{name}: loss by step'),
        'Loss by step of training.',
      ),
    ]
  parts += [page.heading('How to make this again'), *_again(config, folder, lines, held_out)]
  return page.page(f'{name}: longctx report', parts)


# What stands in the workdir.


def _json(path: Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as e:
    raise ConfigError(f'{path}: cannot be read as JSON ({e}); remove it, or evaluate again') from e


def lines_of(folder: str, name: str) -> list[dict]:
  """The lines of a JSON-lines file; a torn last one is left out."""
  path = Path(folder) / name
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return []
  whole = data[:data.rfind(b'\n') + 1].splitlines()
  try:
    return [json.loads(line) for line in whole]
  except ValueError as e:
    raise ConfigError(f'{path}: a line is no JSON ({e}); remove it') from e


def newest(lines: Sequence[dict]) -> tuple[list[dict], int]:
  """(the lines of the evaluation that was written last, how many there are of others).

  It has the settings of the last line, and of each task the lines of one key: the newest whose text and depths
  are those of the tasks taken before, so that one command asks them all.
  """
  keys, texts, seen = {}, {}, set()
  for line in reversed(lines):
    task, key = line['task'], line['key']
    if task in keys or (task, key) in seen or settings_of(line) != settings_of(lines[-1]):
      continue
    seen.add((task, key))
    # Of a folder each task reads files of its own: its path is what they share.
    digests = {source: of for source, of in (line.get('digests') or {}).items() if source != 'files'}
    reads = sources.read_by(task, line, digests) | ({'depths': line['depths']} if 'depths' in line else {})
    if all(texts.get(source, text) == text for source, text in reads.items()):
      keys[task] = key
      texts |= reads
  counted = [line for line in lines if line['key'] == keys.get(line['task'])]
  return list({records.identity(line): line for line in counted}.values()), len(lines) - len(counted)


def settings_of(line: dict) -> str:
  return line.get('settings', line['key'])   # lines were once written with one key for all tasks


def _about(config: dict, lines: Sequence[dict], held_out: dict | None) -> str:
  model = config['model']
  sizes = [f'{model[key]:,} {words}' for key, words in
           (('num_layers', 'layers'), ('embed_dim', 'wide'), ('segment', 'tokens a segment'))
           if model.get(key)]
  kind = f'{model["name"]}' + (
    f' with {model["long_term"]}' if model.get('long_term', 'none') != 'none' else ''
  )
  step = lines[-1].get('step') if lines else (held_out or {}).get('step')
  at = [] if step is None else [f'checkpoint of step {step:,}']
  return ', '.join([kind, *sizes, f'trained on rows of {config["data"]["length"]:,} tokens', *at])


# Tasks.


def _tasks(config: dict, lines: list[dict], others: int) -> list[str]:
  cells = records.cells(lines)
  known = _floors(lines)
  columns = ['task', 'length', 'score, %', '95 % interval', 'guessing', 'without context', 'n']
  columns.append('too long')
  rows = [[c.name, f'{c.length:,}', records.percent(c.score and c.score.mean),
           '-' if c.score is None else f'{records.percent(c.score.low)} to {records.percent(c.score.high)}',
           records.percent(known.get(c.task)), records.percent(c.control), f'{c.count:,}', f'{c.too_long:,}']
          for c in cells]
  parts = [
    page.heading('Tasks'),
    page.table(columns, rows),
    page.paragraph(
      'guessing: the score of one who has read the rules and not the text. without context: the '
      'same questions with no text before them; what is right there was not read. too long: '
      'examples that were not put, being longer than the model takes.',
      soft=True,
    ),
    *(page.paragraph(note, soft=True) for note in records.footnotes(cells)),
  ]
  for beside in ruler_summary.compared(cells):
    parts += [f'<h3>{page.text(beside.title)}</h3>', page.table(beside.columns, beside.rows),
              *(page.paragraph(note, soft=True) for note in beside.notes)]
  if others:
    parts.append(
      page.paragraph(
        f'tasks.jsonl holds {others:,} lines of other evaluations (another checkpoint, seed '
        'or setting), which are not counted here.',
        soft=True,
      )
    )
  parts += [page.figure(one.draw, one.caption) for one in drawings(config, lines)]
  return parts


def _floors(lines: Sequence[dict]) -> dict[str, float | None]:
  """Of each task the score of guessing, with the text that it read."""
  return {line['task']: floor(line['task'], line) for line in lines if line['task'] in TASKS}


class Drawing(NamedTuple):
  """A figure that is not drawn yet."""

  name: str                        # of its file
  draw: Callable[[Any], None]      # into an open file
  caption: str


def drawings(config: dict, lines: list[dict]) -> list[Drawing]:
  """The figures of tasks: score by length, and by depth where there are needles."""
  cells, found = records.cells(lines), []
  curves = _lines(cells, _floors(lines))
  names = list(curves)
  for number, at in enumerate(range(0, len(names), LINES)):
    some = {name: curves[name] for name in names[at:at + LINES]}
    draw = lambda file, some=some: accuracy.draw(some, file, title='Score by length',
                                                 trained=config['data']['length'])
    found.append(
      Drawing(
        'score_by_length' + (f'_{number}' if number else ''),
        draw,
        'Score by length with 95 % '
        'intervals; dotted: guessing; dashed: the length of rows in training.',
      )
    )
  for task in names:
    found += _depths(
      task, [line for line in lines if line['task'] == task and not line['too_long']]
    )
  return found


def _lines(cells: Sequence[records.Cell], floors: dict[str, float | None]) -> dict[str, accuracy.Line]:
  points: dict[str, list[accuracy.Point]] = {}
  for c in cells:
    if c.score is not None:
      points.setdefault(c.task, []).append(accuracy.Point(c.length, *c.score, c.count))
  return {task: accuracy.Line(found, floors.get(task)) for task, found in points.items()}


def _depths(task: str, lines: list[dict]) -> list[Drawing]:
  """The heat map of a task whose needles have depths."""
  placed = [line for line in lines if line['depth'] is not None]
  if len(placed) < 2:
    return []
  asked = {line['depth_asked'] for line in placed}
  # Where depths were asked for each has its row: a needle stands as near to it as sentences let it.
  depth_of = lambda line: line['depth'] if None in asked else line['depth_asked']
  if None in asked:  # drawn: so many bands that each has a few examples
    least = min(
      sum(line['length'] == n for line in placed) for n in {line['length'] for line in placed}
    )
    rows = max(2, min(BANDS, least // 3))
  else:
    rows = max(2, len(asked))
  cells = heatmap.grid([(line['length'], depth_of(line), line['score']) for line in placed], rows)
  return [Drawing(f'depth_{task}', lambda file: heatmap.draw(cells, file, title=task),
                  f'{task}: score by length and by depth of the needle. Hatched: no example.')]


# Examples.


def remake(line: dict, tokenizer: Tokenizer) -> Example:
  """The example that a line is of; ConfigError where it cannot be made again."""
  task = line['task']
  check(task in TASKS, f'{task}: is no task of this version of longctx')
  settings = {name: line[name] for name in SOURCES if name in line}
  made = example(
    task,
    TASKS[task],
    tokenizer,
    length=line['length'],
    index=line['index'],
    seed=line['seed'],
    depth=line['depth_asked'],
    **settings,
  )
  check(
    hashlib.sha256(made.prompt).hexdigest() == line['prompt_sha256'],
    f'{task}: example {line["index"]} is made otherwise now than when it was answered',
  )
  return made


def _examples(config: dict, lines: list[dict]) -> list[str]:
  """Of each task, at its shortest and its longest length, one that is right and one that is not."""
  try:
    tokenizer = load_tokenizer(config['data']['tokenizer'])
  except ConfigError as e:
    return [page.paragraph(f'The prompts cannot be made again: {e}', soft=True)]
  parts = []
  for number, task in enumerate(dict.fromkeys(line['task'] for line in lines)):
    asked = [line for line in lines if line['task'] == task and not line['too_long']]
    shown = []
    for length in sorted({line['length'] for line in asked})[::-1][:1] + sorted(
        {line['length'] for line in asked})[:1]:
      here = [line for line in asked if line['length'] == length]
      right = max(here, key=lambda line: (line['score'], -line['index']))
      wrong = min(here, key=lambda line: (line['score'], line['index']))
      for line in (right, wrong) if right['score'] > wrong['score'] else (right,):
        if line not in shown:
          shown.append(line)
    body = '\n'.join(_example(line, tokenizer) for line in shown[::-1])
    if not shown:
      body = page.paragraph('No example was put: all are longer than the model takes.')
    folded = page.details(f'{task}: {len(shown)} of {len(asked):,} examples', body)
    parts.append(folded.replace('<details>', '<details open>', 1) if number == 0 else folded)
  return parts


def _example(line: dict, tokenizer: Tokenizer) -> str:
  depth = '' if line['depth'] is None else f', needle at {100 * line["depth"]:.0f} % of the text'
  title = f'{line["task"]}, {line["length"]:,} tokens, example {line["index"]}{depth}'
  try:
    made = remake(line, tokenizer)
    prompt = page.preformatted(page.excerpt(made.prompt, made.needles))
  except ConfigError as e:
    prompt = page.paragraph(f'The prompt cannot be shown: {e}', soft=True)
  return f'<h3>{page.text(title)}</h3>\n{prompt}\n{answer(line)}'


def answer(line: dict) -> str:
  """What was written, what is right, and whether it is."""
  quoted = lambda words: f'<code>{page.text(words)}</code>'
  parts = [f'answer: {quoted(line["written"])} {page.verdict(line["score"])}',
           'expected: ' + ', '.join(map(quoted, line['references']))]
  if line.get('control_written') is not None:
    parts.append(
      f'without context: {quoted(line["control_written"])} {page.verdict(line["control_score"])}'
    )
  if line.get('answer_logprob') is not None:
    parts.append(f'log-probability of the right answer: {line["answer_logprob"]:.3f} nats')
  return '<p>' + '<br>\n'.join(parts) + '</p>'


# The rest.


def _again(config: dict, folder: str, lines: list[dict], held_out: dict | None) -> list[str]:
  parts = []
  if lines and 'overrides' not in lines[-1]:
    parts.append(page.paragraph('The answers to tasks were written before their settings were kept with them: '
                                'evaluate again to have the command.', soft=True))
  elif lines:
    parts += _command('Tasks', config, folder, lines[-1], lambda run: again.of_tasks(run, lines))
  if held_out:
    parts += _command('Held-out text', config, folder, held_out, lambda run: again.of_held_out(run, held_out))
  if any('--config=CONFIG' in part for part in parts):
    parts.append(page.paragraph('CONFIG: the file whose config is printed below.', soft=True))
  for title, found in (('of the evaluation', lines[-1] if lines else None), ('of held-out text', held_out)):
    if found:
      rows = [[key, json.dumps(found[key]).strip('"')] for key in IDENTITY if found.get(key) is not None]
      parts.append(page.table([title, 'value'], rows))
  config_text = json.dumps(config, indent=2, sort_keys=True)
  return [*parts, page.details('config.json', page.preformatted(page.text(config_text)))]


def _command(title: str, config: dict, folder: str, found: dict, overrides: Callable[[dict], dict]) -> list[str]:
  """Of a line or of evaluation.json."""
  words, whole = again.of_now(folder, config, found, overrides)
  parts = [f'<h3>{page.text(title)}</h3>', page.preformatted(page.text(shlex.join(words)), 'command')]
  if not whole:
    parts.append(page.paragraph('config.json has changed since: give as CONFIG the config that the run had then.',
                                soft=True))
  return parts
