"""The report: what is in a workdir is what stands on the page, made safe; mistakes in a line."""

import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from flax import nnx

from longctx import assembly, configuration, report
from longctx.data.tasks import sources
from longctx.data.tasks.example import example
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import inspect, inspect_page, page, reads
from longctx.evaluation import report as report_page
from longctx.models import decoder, encoder_config, encoder_decoder
from longctx.training import workdir as workdir_lib


def line_of(task='passkey', length=512, index=0, score=1.0, written=' 12345', **more):
  made = example(task, TASKS[task], Bytes(), length=length, index=index, seed=0)
  return (
    dict(
      key='k',
      task=task,
      length=length,
      index=index,
      seed=0,
      haystack='',
      depth_asked=None,
      depth=made.depth,
      prompt_sha256=hashlib.sha256(made.prompt).hexdigest(),
      prompt_tokens=len(made.prompt) + 1,
      new_tokens=made.new_tokens,
      references=list(made.references),
      too_long=False,
      written=written,
      score=score,
      control_written='<b>&amp;',
      control_score=0.0,
      step=40,
      checkpoint='abc',
      config='def',
      tokenizer='bytes',
      use_ema=False,
      overrides={'eval.tasks': ['passkey'], 'eval.lengths': [512, 1024], 'eval.samples': 8, 'eval.controls': False},
      versions=dict(longctx='0.1', jax='0.10'),
    )
    | more
  )


LINES = [line_of(length=n, index=i, score=float(i % 4 > 0 or n < 600), written=f' <i>{i}</i>\x00')
         for n in (512, 1024) for i in range(8)]
SCORED = dict(tokens=100, bytes=100, not_finite=0, bits_per_byte=2.5, perplexity=5.0, loss=1.7)
HELD_OUT = dict(
  step=40,
  split='validation',
  length=64,
  documents=1,
  stride=0,
  bits_per_byte=2.5,
  loss=1.7,
  modes={
    'full': dict(SCORED, positions=[dict(SCORED, first=i, last=i, few=False) for i in range(2)])
  },
)
METRICS = [dict(step=i, loss=3.0 - i / 10) for i in range(1, 6)]


def write(folder, lines=LINES, held_out=HELD_OUT, metrics=METRICS):
  """A workdir in which all that is told was found."""
  folder.mkdir(exist_ok=True)
  config = workdir_lib.plain(configuration.base('decoder'))
  (folder / 'config.json').write_text(json.dumps(config))
  for name, values in (('tasks.jsonl', lines), ('metrics.jsonl', metrics)):
    (folder / name).write_text(''.join(json.dumps(value) + '\n' for value in values))
  if held_out:
    (folder / 'evaluation.json').write_text(json.dumps(held_out))
  return folder


EMPTY = {'meta', 'link', 'br', 'img', 'source'}   # tags that are never closed


class Outline(html.parser.HTMLParser):
  """Tags that are open at the end, what is linked, texts by their tag, rows of tables."""

  def __init__(self, data):
    super().__init__()
    self.open, self.links, self.texts, self.rows = [], [], {}, []
    self.feed(data)

  def handle_starttag(self, tag, attrs):
    if tag not in EMPTY:
      self.open.append(tag)
    self.links += [
      value for name, value in attrs if name in ('src', 'href', 'srcset', 'action', 'data')
    ]
    self.texts.setdefault(tag, []).append('')
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    for tag in set(self.open):
      self.texts[tag][-1] += data
    if self.open and self.open[-1] in ('td', 'th'):
      self.rows[-1][-1] += data


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = write(tmp_path_factory.mktemp('run') / 'my <run>')
  path = report_page.write(str(folder))
  assert path == str(folder / 'report.html')
  data = (folder / 'report.html').read_bytes()
  return data, Outline(data.decode('utf-8'))


def test_the_page_is_whole_and_loads_nothing(made):
  data, outline = made
  assert not outline.open
  assert outline.links and all(link.startswith('data:') for link in outline.links)
  assert 'script' not in outline.texts and b'http' not in re.sub(rb'http-equiv', b'', data)
  assert outline.texts['title'] == ['my <run>: longctx report']


def test_scores_stand_in_the_table_with_intervals_floors_and_controls(made):
  rows = made[1].rows
  at = next(i for i, row in enumerate(rows) if row[0] == 'task')
  assert rows[at][:6] == [
    'task',
    'length',
    'score, %',
    '95 % interval',
    'guessing',
    'without context',
  ]
  # Wilson's interval of 6 of 8, and of 8 of 8, from tables.
  assert rows[at + 1] == ['passkey', '512', '100.0', '67.6 to 100.0', '0.001', '0.0', '8', '0']
  assert rows[at + 2] == ['passkey', '1,024', '75.0', '40.9 to 92.9', '0.001', '0.0', '8', '0']


def test_figures_are_there_for_light_and_dark(made):
  captions = made[1].texts['figcaption']
  assert [caption.split(':')[0].split(' with')[0] for caption in captions] == [
      'Score by length', 'passkey', 'Loss by context position', 'Loss by step of training.']
  assert len([link for link in made[1].links if link.startswith('data:image/png;base64,')]) == 2 * 4


def test_figures_of_tasks_are_files_too(made, tmp_path):
  folder = write(tmp_path / 'w', held_out=None, metrics=[])
  report_page.write(str(folder))
  files = sorted(path.name for path in (folder / 'figures').iterdir())
  assert files == ['depth_passkey.png', 'score_by_length.png']
  assert all(
    base64.b64encode((folder / 'figures' / name).read_bytes()) in made[0] for name in files
  )


def test_examples_show_the_prompt_its_needle_and_the_answer(made):
  _, outline = made
  text = ' '.join(outline.texts['details'])
  titles = [t for t in outline.texts['h3'] if t.startswith('passkey')]
  assert [re.sub(', needle.*', '', t) for t in titles] == [
    'passkey, 512 tokens, example 0',
    'passkey, 1,024 tokens, example 0',
    'passkey, 1,024 tokens, example 1',
  ]
  needles = [example('passkey', TASKS['passkey'], Bytes(), length=n, index=i, seed=0)
             for n, i in ((512, 0), (1024, 0), (1024, 1))]
  assert outline.texts['mark'] == [m.prompt[slice(*m.needles[0])].decode() for m in needles]
  assert ' <i>0</i>\u2400' in text and '<b>&amp;' in text   # as they were written, not as markup
  assert {'right', 'wrong'} <= set(outline.texts['span'])
  assert '\u2026 ' in text   # the longer prompts are cut, and say how much


def test_the_command_makes_the_same_evaluation_again(made):
  command, held_out = made[1].texts['pre'][-3:-1]
  assert held_out.strip().endswith("my <run>' --mode=eval --checkpoint=40")
  for flag in (
    '--mode=eval',
    '--checkpoint=40',
    "--config.eval.tasks=('\"'\"'passkey'\"'\"',)",
    '--config.eval.lengths=(512, 1024)',
    '--config.eval.samples=8',
    '--config.eval.controls=False',
  ):
    assert flag in command
  assert '"embed_dim"' in made[1].texts['pre'][-1]


def test_lines_of_other_evaluations_and_torn_ones_are_not_counted(tmp_path):
  old = [line_of(index=i, score=0.0, key='other') for i in range(3, 6)]
  folder = write(tmp_path / 'w', lines=[*old, *LINES[:4], dict(LINES[0], score=0.0)])
  with open(folder / 'tasks.jsonl', 'a') as file:
    file.write('{"key": "k", "task": "pass')
  outline = Outline(report_page.render(str(folder)).decode())
  row = next(row for row in outline.rows if row[0] == 'passkey')
  assert row[2] == '75.0' and row[6] == '4'   # the later line of example 0 counts
  assert any('3 lines of other evaluations' in text for text in outline.texts['p'])


def test_an_evaluation_is_of_texts_that_one_command_can_give():
  def ask(task, haystack='', digest='', settings='s', files=''):
    read = sources.read_by(task, dict(haystack=haystack, files=files), dict(haystack=digest) if digest else {})
    return dict(task=task, length=9, index=0, key=f'{settings}{task}{read}', settings=settings, haystack=haystack,
                files=files, digests=dict(haystack=digest) if digest else {})
  def counted(*lines):
    return [line['n'] for line in report_page.newest([line | dict(n=n) for n, line in enumerate(lines)])[0]]
  assert counted(ask('s3'), ask('passkey', 'noise')) == [0, 1]
  assert counted(ask('niah', 'repeated'), ask('passkey', 'noise')) == [1]
  assert counted(ask('niah'), ask('passkey', 'noise')) == [1]
  assert counted(ask('niah', 'noise'), ask('passkey', 'noise'), ask('niah'), ask('passkey', 'noise')) == [0, 3]
  assert counted(ask('niah', '/a', 'x'), ask('passkey', '/b', 'x')) == [0, 1]   # moved
  assert counted(ask('niah', '/a', 'x'), ask('passkey', '/a', 'y')) == [1]      # edited
  assert counted(ask('s3', settings='t'), ask('passkey')) == [1]
  assert counted(ask('lra_text', files='/a'), ask('lra_image', files='/a')) == [0, 1]
  assert counted(ask('lra_text', files='/a'), ask('lra_image', files='/b')) == [1]


def test_a_prompt_that_is_made_otherwise_now_is_not_shown(tmp_path):
  changed = dict(LINES[0], prompt_sha256='0' * 64)
  gone = line_of() | dict(task='no_such_task', score=1.0)
  outline = Outline(report_page.render(str(write(tmp_path / 'w', lines=[changed, gone]))).decode())
  text = ' '.join(outline.texts['p'])
  assert 'is made otherwise now' in text and 'no_such_task: is no task of this version' in text
  assert 'mark' not in outline.texts


def test_what_is_missing_is_left_out_and_nothing_at_all_is_refused(tmp_path):
  folder = write(tmp_path / 'w', lines=[], held_out=None)
  outline = Outline(report_page.render(str(folder)).decode())
  assert outline.texts['h2'] == ['Training', 'How to make this again']
  with pytest.raises(ConfigError, match='nothing was measured there yet'):
    report_page.render(str(write(tmp_path / 'v', lines=[], held_out=None, metrics=[])))
  with pytest.raises(ConfigError, match=r'no run was started there'):
    report_page.render(str(tmp_path))


def test_held_out_text_has_intervals_long_ppl_and_the_gain_by_position(tmp_path):
  ends = dict(bits_per_byte_low=2.4, bits_per_byte_high=2.6, perplexity_low=4.5, perplexity_high=None)
  full = dict(SCORED, **ends, positions=[dict(SCORED, **ends, first=4, last=7, few=False),
                                         dict(SCORED, first=0, last=0, few=True)])
  row = dict(first=4, last=7, tokens=1200, keys=7, gain=0.25, gain_low=-0.5, gain_high=1.0)
  none = dict(first=0, last=0, tokens=1, keys=0, gain=0.0, gain_low=None, gain_high=None)
  keys = dict(short_context=64, stride=16, alpha=2.0, beta=2.0, share=0.00583, perplexity=1.5, perplexity_low=1.25,
              perplexity_high=2.0, **{name: row[name] for name in row if name not in ('first', 'last')},
              positions=[none, row])
  held_out = HELD_OUT | dict(modes=dict(full=full), key_tokens=keys)
  folder = write(tmp_path / 'w', lines=[], metrics=[], held_out=held_out)
  outline = Outline(report_page.render(str(folder)).decode())
  scored = ['100', '2.5000', '2.4000 to 2.6000', '5.000', '-']
  assert ['full', *scored] in outline.rows and ['4-7', *scored] in outline.rows
  assert ['0', *scored] not in outline.rows   # a bin of few tokens
  assert ['1,200', '7', '0.6', '1.500', '1.250 to 2.000'] in outline.rows
  gained = ['1,200', '7', '0.2500', '-0.5000 to 1.0000']
  assert [['0', '1', '0', '0.0000', '-'], ['4-7', *gained], ['all', *gained]] == outline.rows[
      (at := outline.rows.index(['position', 'tokens', 'key tokens', 'gain, nats', '95 % interval']) + 1):at + 3]
  assert any('the last 48 to 64 tokens alone' in text for text in outline.texts['p'])
  earlier = write(tmp_path / 'v', lines=[], metrics=[])   # without intervals
  assert ['full', '100', '2.5000', '-', '5.000', '-'] in Outline(report_page.render(str(earlier)).decode()).rows


def test_examples_of_rows_that_are_right_have_a_table(tmp_path):
  folder = write(
    tmp_path / 'w',
    lines=[],
    metrics=[],
    held_out=dict(step=3, form='pairs', split='test', right_rows=0.25, rows=8, loss=None),
  )
  rows = Outline(report_page.render(str(folder)).decode()).rows
  assert ['right rows', '0.25'] in rows


@pytest.mark.parametrize('given, shown', [
    ('<script>alert(1)</script>', '&lt;script&gt;alert(1)&lt;/script&gt;'),
    ('" onload=x \'', '&quot; onload=x &#x27;'),
    (b'\xff\xfe ok', '\ufffd\ufffd ok'), ('\x00\x1b[31m\x7f', '\u2400\u241b[31m\u2421'),
    ('a\tb\nc\r\nd\re', 'a\tb\nc\nd\u240de'), ('\u202egnp.exe', '\u27e8U+202E\u27e9gnp.exe'),
    ('\ud800', '?'), ('naïve 中文 🙂', 'naïve 中文 🙂')])
def test_text_is_made_safe(given, shown):
  assert page.text(given) == shown
  page.page('t', [page.text(given)]).decode('utf-8')


def test_an_excerpt_holds_both_ends_and_all_that_is_marked():
  data = bytes(range(97, 123)) * 400
  shown = page.excerpt(data, [(5000, 5010), (5008, 5020)])
  assert shown.startswith(data[:page.EDGE].decode()) and shown.endswith(data[-page.EDGE:].decode())
  assert f'<mark>{data[5000:5020].decode()}</mark>' in shown
  counts = [int(x.replace(',', '')) for x in re.findall(r'\u2026 ([\d,]+) bytes', shown)]
  plain = re.sub(r'<span class="left">.*?</span>|</?mark>', '', shown)
  assert len(plain) + sum(counts) == len(data) and len(counts) == 2
  assert page.excerpt(b'short', [(0, 5)]) == '<mark>short</mark>'


# What an answer drew on.


def looked(weights_T=None, occlusion_T=None):
  """A prompt of 30 tokens and an answer of 2; of the two heads the second reads token 12."""
  tokens_NRT = np.zeros((2, 2, 32), np.float32)
  tokens_NRT[0, :, 29], tokens_NRT[1, :, 12] = 1, .75
  maps = {'attention': reads.Read(tokens_NRT, 1 - tokens_NRT.sum(-1))}
  layer = inspect.Layer(3, 'infini', maps, None, {'gate': np.full((2, 2), .5)})
  norms = inspect.Norms(np.array([16, 30]), {(3, 'M'): np.array([1., 2.])})
  tokens = np.concatenate(
    [[256], np.frombuffer('0123456789 n\u00e9edle <b>, what ? = 42'.encode(), np.uint8)]
  )
  return inspect.Inspection(tokens[:32].astype(np.int32), 30, np.log([.5, .25]), (layer,), norms,
                            occlusion_T, ('a note <&>',))


def test_an_inspection_names_heads_that_read_the_needle():
  found = looked(occlusion_T=np.eye(32, dtype=np.float32)[12])
  text = inspect_page.text_of(found, Bytes(), needles=[(11, 18)], question=24)
  assert (
    text.needles == [(12, 19)] and text.question == 25
  )  # the separator is a token without a byte
  data = inspect_page.section('t', found, text, '<p>answer</p>')
  outline = Outline(data)
  assert not outline.open
  rows = outline.rows
  at = rows.index(['head', 'of its reading'])
  assert rows[at + 1 : at + 3] == [
    ['layer 3 attention, head 1', '75.0 %'],
    ['layer 3 attention, head 0', '0.0 %'],
  ]
  assert ['layer 3 attention', '87.5 %', '0.0 %', '12.5 %'] in rows
  assert ['layer 3 infini: gate', '0.5  0.5'] in rows
  assert 'a note <&>' in outline.texts['p'] and any('-2.079 nats' in p for p in outline.texts['p'])
  assert len(outline.links) == 4
  first, second = outline.texts['pre']
  assert '0123456789 n\u00e9edle <b>, what' in first and '\ufffd' not in first and first == second


def test_the_strip_shades_tokens_by_their_weight_and_marks_the_needle():
  found = looked()
  text = inspect_page.text_of(found, Bytes(), needles=[(11, 18)])
  weights = np.zeros(30)
  weights[12], weights[14] = 1, .5    # n, and the second byte of the accented letter
  data = inspect_page.strip(text, weights)
  shades = re.findall(r'rgba\(var\(--heat\),([\d.]+)\)">(.)</span>', data)
  assert shades == [('1.00', 'n'), ('0.50', '\u00e9')]
  assert re.sub('<.*?>', '', re.search('<mark>.*</mark>', data).group()) == 'n\u00e9edle'


def test_a_long_prompt_is_cut_where_nothing_was_read():
  pieces = [b'x'] * 5000
  weights = np.zeros(5000)
  weights[2500] = 1
  data = inspect_page.strip(inspect_page.Text(pieces, [(1000, 1010)], 0), weights)
  counts = [int(x.replace(',', '')) for x in re.findall(r'\u2026 ([\d,]+) tokens', data)]
  shown = re.sub(r'<span class="left">.*?</span>|<.*?>', '', data).count('x')
  assert shown + sum(counts) == 5000 and len(counts) == 3 and shown < 1000


def test_without_a_needle_the_tokens_that_are_read_most_are_named():
  found = looked()
  rows = Outline(inspect_page.section('t', found, inspect_page.text_of(found, Bytes()), '')).rows
  at = rows.index(['token, between its neighbours', 'place', 'mean weight'])
  assert [row[1:] for row in rows[at + 1:at + 3]] == [['29', '50.0 %'], ['12', '37.5 %']]


# The face.


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], '--workdir: missing'),
    (['--workdir=nowhere'], '--workdir=nowhere: no such folder'),
    (
      ['--workdir={w}', '--examples=passkey'],
      '--examples=passkey, --layers=: must be task:length:index',
    ),
    (
      ['--workdir={w}', '--examples=passkey:512:99'],
      '--examples=passkey:512:99: is not in the last evaluation',
    ),
    (
      ['--workdir={w}', '--prompt=a', '--prompt_file=b'],
      '--prompt, --prompt_file: give one of them',
    ),
    (['--workdir={w}', '--answer=best'], "--answer='best': must be one of written, right"),
    (['--workdir={w}', '--pieces=-1'], '--pieces=-1: must be at least 0'),
  ],
)
def test_mistakes_end_in_one_line(flags, message, tmp_path, capsys):
  folder = write(tmp_path / 'w')
  assert report.main(['report', *(flag.format(w=folder) for flag in flags)]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_the_face_writes_the_report(tmp_path, capsys):
  folder = write(tmp_path / 'w', held_out=None, metrics=[], lines=LINES[:1])
  assert report.main(['report', f'--workdir={folder}']) == 0
  assert capsys.readouterr().out == f'report: {folder}/report.html\n'
  assert (folder / 'report.html').stat().st_size > 5000


def test_the_face_looks_into_examples_and_prompts(tmp_path, capsys, monkeypatch):
  """With a model that was never trained, in the place of a checkpoint."""
  config = decoder.Config(vocab_size=257, num_layers=1, embed_dim=8, num_heads=2, max_length=512,
                          layer_loop='unrolled', remat='none', attention='reference')
  graphdef, params = nnx.split(decoder.Decoder(config, rngs=nnx.Rngs(0)))
  monkeypatch.setattr(assembly, 'load_for_inference', lambda *_, **__: assembly.Trained(
      graphdef, params, Bytes(), config, None, line_of()['step']))
  folder = write(tmp_path / 'w', held_out=None, metrics=[], lines=[line_of(length=320)])
  other = write(tmp_path / 'other', held_out=None, metrics=[], lines=[line_of(length=320, step=1)])
  given = ['report', f'--workdir={folder}', '--pieces=3', '--segment=64']
  assert report.main([*given, '--examples=passkey:320:0', '--answer=right', '--layers=0']) == 0
  outline = Outline((folder / 'report.html').read_text())
  made = example('passkey', TASKS['passkey'], Bytes(), length=320, index=0, seed=0)
  assert 'What the answer drew on: passkey, 320 tokens, example 0' in outline.texts['h2']
  assert 'What is looked into is the expected answer.' in outline.texts['p']
  needle = made.prompt[slice(*made.needles[0])].decode()
  shown = outline.texts['mark'][1:]   # the first is of the examples
  assert ''.join(shown).startswith(needle)   # in the two strips, in runs of one shade
  at = outline.rows.index(['head', 'of its reading'])
  assert {row[0] for row in outline.rows[at + 1:at + 3]} == {'layer 0 attention, head 0',
                                                             'layer 0 attention, head 1'}
  assert report.main(['report', f'--workdir={other}', '--examples=passkey:320:0', '--answer=right']) == 2
  assert '--examples=passkey:320:0: was answered by step 1, use_ema=False, and --checkpoint=newest is step' in (
      capsys.readouterr().err)
  assert report.main([*given, '--examples=passkey:320:0', '--layers=1']) == 2
  assert '--layers=1: must be at least 0 and at most 0' in capsys.readouterr().err
  assert (
    report.main(
      [*given, f'--prompt={made.prompt[:200].decode()}', '--max_new_tokens=2', '--pieces=0']
    )
    == 0
  )
  outline = Outline((folder / 'report.html').read_text())
  assert 'What the answer drew on: --prompt' in outline.texts['h2']


@pytest.mark.slow
def test_the_face_looks_into_what_was_written_after_a_source(tmp_path, capsys, monkeypatch):
  config = encoder_config.PairConfig(vocab_size=257, num_layers=1, embed_dim=8, num_heads=2, max_length=16,
                                     source_length=16, layer_loop='unrolled')
  graphdef, params = nnx.split(encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(0)))
  monkeypatch.setattr(assembly, 'load_for_inference', lambda *_, **__: assembly.Trained(
      graphdef, params, Bytes(), config.resolved(257), None, 0))
  folder = write(tmp_path / 'w', held_out=None, metrics=[], lines=[])
  given = ['report', f'--workdir={folder}']
  assert report.main([*given, '--source=two birds', '--max_new_tokens=3']) == 0
  outline = Outline((folder / 'report.html').read_text())
  assert 'What the answer drew on: --source' in outline.texts['h2']
  rows = {row[0]: [float(cell.rstrip(' %')) for cell in row[1:]] for row in outline.rows if row[0].startswith('layer 0')}
  # Of cross attention all goes to the source, of its own some to what was written.
  assert rows['layer 0 cross attention'] == [100.0, 0.0, 0.0]
  assert rows['layer 0 attention'][1] > 0 and sum(rows['layer 0 attention']) == pytest.approx(100, abs=0.2)
  assert report.main([*given, '--prompt=a']) == 2
  assert "--source: missing; model.name='encoder_decoder'" in capsys.readouterr().err
