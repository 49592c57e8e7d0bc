"""Tasks put to subjects, through the whole pipeline: who knows scores 100, who says one thing the floor."""

import dataclasses
import functools
import html
import json
import math
import re
import shlex
import shutil

import jax
import numpy as np
import pytest

from longctx import assembly, command_line, examine, main
from longctx.data.tasks import example, paragraphs, version
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import again, course, records, report, tasks
from longctx.evaluation.subject import Constant, Oracle
from longctx.training import workdir
from tests import test_task_questions, test_tasks
from tests.test_task_ruler_compat import by_hand

ABOUT = dict(checkpoint='c', model='m', tokenizer='bytes', step=3)


def evaluate(subject, folder, about=ABOUT, **settings):
  config = tasks.Config(**(dict(tasks=('parity',), lengths=(64,), samples=10, batch_size=4) | settings))
  return tasks.run(subject, config, str(folder), about, lengths=config.lengths)


def examples(names, lengths, samples, seed=0):
  return [example.example(name, TASKS[name], Bytes(), length=length, index=i, seed=seed)
          for name in names for length in lengths for i in range(samples)]


def lines_of(folder):
  return [json.loads(line) for line in (folder / 'tasks.jsonl').read_text().splitlines()]


def test_an_oracle_scores_a_hundred_and_its_control_nothing(tmp_path, capsys):
  names, lengths = ('passkey', 'parity'), (300, 512)
  found = evaluate(Oracle(Bytes(), examples(names, lengths, 10)), tmp_path, tasks=names, lengths=lengths,
                   answers=True)
  assert [(c.task, c.length, c.count) for c in found] == [
      (name, length, 10) for name in names for length in lengths]
  assert all(c.score.mean == 1 and c.control == 0 and c.logprob == 0 for c in found)
  assert len(lines_of(tmp_path)) == 40
  table = (tmp_path / 'tasks.md').read_text()
  assert '| passkey | 300 | 100.0 | 72.2 to 100.0 |' in table
  assert capsys.readouterr().out.endswith(table)


# Every task but those that read files: these are put in tests/test_task_lra.py.
COMPAT = sorted(name for name in TASKS if name.startswith('ruler_compat_'))
PUT = 4   # examples of each
MOST_SAID = 26   # of the guesses that an answer has: all goods and rivers, a few of the years


def case(name):
  """(tokenizer, length) of the least that a task can be put at, and a little more."""
  return (by_hand(), 2048) if name in COMPAT else (Bytes(), test_tasks.short(name))


@functools.cache
def put(name):
  """The first examples of a task."""
  tok, length = case(name)
  return [example.example(name, TASKS[name], tok, length=length, index=i) for i in range(PUT)]


@pytest.mark.parametrize('name', [*test_tasks.NAMES, *COMPAT])
def test_of_every_task_the_oracle_scores_a_hundred(name, tmp_path):
  tok, length, made = *case(name), put(name)
  oracle = Oracle(tok, made)
  one, = evaluate(oracle, tmp_path, tasks=(name,), lengths=(length,), samples=PUT)
  assert (one.score.mean, one.control, one.count) == (1, 0, PUT)
  # Shown the first two alone, it knows no more.
  half, = evaluate(Oracle(tok, made[:2]), tmp_path, dict(ABOUT, checkpoint='half'), tasks=(name,), lengths=(length,), samples=PUT)
  assert half.score.mean == 0.5
  # One who knows the questions without their contexts, and nothing else: the last answer, where they are alike.
  alone = {one.without_context: one.target.decode() for one in made}
  control, = evaluate(Oracle(tok, [dataclasses.replace(one, prompt=one.without_context) for one in made]), tmp_path,
                      dict(ABOUT, checkpoint='alone'), tasks=(name,), lengths=(length,), samples=PUT)
  assert control.score.mean == 0
  assert control.control == pytest.approx(np.mean([TASKS[name].score(alone[one.without_context], one) for one in made]))
  assert control.control >= 1 / PUT


@pytest.mark.parametrize('name', [*test_tasks.NAMES, *COMPAT])
def test_of_every_task_one_examples_answer_is_right_for_those_it_answers_alone(name, tmp_path):
  tok, length, made = *case(name), put(name)
  evaluate(Constant(tok, made[0].target), tmp_path, tasks=(name,), lengths=(length,), samples=PUT)
  lines = lines_of(tmp_path)
  right = [one.references == made[0].references for one in made]
  assert right[0] and [line['score'] == 1 for line in lines] == right
  # An answer is cut to what its own example allows; of answers alike none is cut.
  assert [line['control_score'] == 1 for line in lines] == right


def guesses(name, one):
  """What one who has read the rules and the question guesses among."""
  if name == 'listops':
    return ['0', '9']   # as frequent as each other: the floor is that of either
  if name.startswith('ruler_qa'):
    asked = one.without_context.decode()
    return next(options for (ask, _), options in zip(paragraphs.FACTS.values(), test_tasks.TOWN)
                if re.search(ask.format('.*'), asked))
  return one.info['choices']


@pytest.mark.parametrize('name', [*test_tasks.NAMES, *COMPAT])
def test_of_every_task_who_guesses_scores_the_floor(name, tmp_path):
  """One of several answers is right in each example: those who always say one have the floor together."""
  (tok, length), task, samples = case(name), TASKS[name], PUT
  varied = name in test_tasks.VARIED or name in test_tasks.OTHERWISE
  if varied:   # of mrcr the score is a likeness, much the same in each example
    samples = 6 if 'mrcr' in name else 64 if name == 'listops' else 24
  if varied or name in test_tasks.WITH_CHOICES:
    made = [example.example(name, task, tok, length=length, index=i) for i in range(samples)]
    among = [guesses(name, one) for one in made]
    most = min(max(map(len, among)), MOST_SAID)
    said = [Oracle(tok, [dataclasses.replace(one, target=f' {of[i % len(of)]}'.encode()) for one, of in zip(made, among)])
            for i in range(most)]
  else:
    alphabets = test_tasks.SPELT.get(name, ([], 0))[0]
    options = alphabets[0] if len(alphabets) == 1 and len(alphabets[0]) < 30 else ('0',)
    said = [Constant(tok, option.encode() if name == 'induction' else f' {option}'.encode()) for option in options]
  scores = []   # guessers, examples
  for i, who in enumerate(said):
    evaluate(who, tmp_path, dict(ABOUT, checkpoint=f'{i}'), tasks=(name,), lengths=(length,), samples=samples,
             controls=False, batch_size=samples)
    scores.append([line['score'] for line in lines_of(tmp_path)[-samples:]])
  sure = 1e-9 if len(said) > 1 else 0.002
  if varied:
    sure = 0.05 if 'mrcr' in name else 3.5 * np.std(np.mean(scores, axis=0)) / np.sqrt(samples)
    assert 0 < sure < task.floor   # it can fail
  assert abs(np.mean(scores) - task.floor) < sure


def test_scores_of_ruler_stand_beside_the_published_ones(tmp_path, capsys):
  evaluate(Oracle(Bytes(), examples(('ruler_niah_single_1',), (1024,), 2)), tmp_path,
           tasks=('ruler_niah_single_1', 'parity'), lengths=(1024,), samples=2)
  said = (tmp_path / 'tasks.md').read_text()
  assert capsys.readouterr().out.endswith(said)
  assert '| ruler_niah_single_1 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |' in said
  assert 'average 100.0, wAvg. (inc) 100.0, wAvg. (dec) 100.0, effective length 1,024' in said
  (tmp_path / 'config.json').write_text(json.dumps(dict(
      model=dict(name='decoder'), data=dict(length=1024, tokenizer='bytes'))))
  page = report.render(str(tmp_path)).decode()
  assert 'published: GPT-4-1106-preview at 4096</th>' in page and 'wAvg. (inc) 100.0' in page


def test_a_score_in_text_that_is_made_up_is_marked_and_one_in_text_given_has_no_floor_of_it(tmp_path, capsys):
  """Where the published task has a text of its own; what was read stands in each line, and below the tables."""
  (tmp_path / 'squad.json').write_text(json.dumps(test_task_questions.SQUAD))
  (tmp_path / 'essay').write_text('Here is a sentence. And another one. ' * 20)
  said, words = {}, {}
  for which, given in (('own', {}), ('noise', dict(haystack='noise')),
                       ('given', dict(haystack=f'{tmp_path}/essay', paragraphs=f'{tmp_path}/squad.json'))):
    folder = tmp_path / which
    folder.mkdir()
    evaluate(Constant(Bytes(), b' 1'), folder, tasks=('ruler_niah_single_2', 'ruler_qa_1', 'ruler_vt', 'passkey'),
             lengths=(2048,), samples=1, controls=False, **given)
    said[which], words[which] = (folder / 'tasks.md').read_text(), {line['task']: line['text'] for line in lines_of(folder)}
    assert capsys.readouterr().out.endswith(said[which])
    (folder / 'config.json').write_text(json.dumps(dict(model=dict(name='decoder'), data=dict(length=2048, tokenizer='bytes'))))
    page = html.unescape(report.render(str(folder)).decode())
    for note in re.findall('^(?:-syn|Text given|Published): .*$', said[which], re.MULTILINE):
      assert note in page
    assert ('ruler_qa_1-syn</td>' in page) == (which != 'given')
  assert '| ruler_qa_1-syn | 2,048 | 0.0 | 0.0 to 79.3 | 4.5 | 1 |' in said['own']
  assert '| ruler_qa_1 | 2,048 | 0.0 | 0.0 to 79.3 | - | 1 |' in said['given']
  assert '-syn: made-up text stands in for what the published task has. ruler_niah_single_2: random words in place of Paul ' \
         "Graham's essays; ruler_qa_1: invented documents in place of SQuAD's.\n" in said['own']
  assert f"Text given: ruler_niah_single_2, passkey: '{tmp_path}/essay'; ruler_qa_1: '{tmp_path}/squad.json'.\n" in said['given']
  assert '-syn' not in said['given'] and 'ruler_vt-syn' not in said['own'] and 'Text given' not in said['own']
  # Beside the published scores too.
  assert '| ruler_niah_single_2-syn | 0.0 | 100.0 |' in said['own'] and '| mean of 3, 2 -syn | 0.0 |' in said['own']
  assert 'Tasks marked -syn were put here in other text, made up' in said['own']
  assert '| ruler_niah_single_2-syn | 0.0 |' in said['noise'] and 'Text given: passkey: random words.' in said['noise']
  assert words['own'] == dict(ruler_niah_single_2="random words in place of Paul Graham's essays", ruler_vt='',
                              ruler_qa_1="invented documents in place of SQuAD's", passkey='one sentence over and over')
  assert words['given'] == dict(ruler_niah_single_2=f"'{tmp_path}/essay'", ruler_qa_1=f"'{tmp_path}/squad.json'",
                                ruler_vt='', passkey=f"'{tmp_path}/essay'")


def test_lines_of_before_their_text_was_told_are_marked_by_what_they_read(tmp_path):
  old = dict(key='k', task='babilong_qa1', length=9, index=0, score=1.0, too_long=False, haystack='')
  assert [c.name for c in records.cells([old, old | dict(length=10, haystack='/books')])] == ['babilong_qa1-syn', 'babilong_qa1']
  assert [c.name for c in records.cells([old | dict(task='of_old')])] == ['of_old']


def test_who_says_one_thing_scores_the_floor(tmp_path):
  one, = evaluate(Constant(Bytes(), b' even'), tmp_path, samples=400, batch_size=100)
  assert one.score.low < TASKS['parity'].floor < one.score.high
  assert one.control == one.score.mean   # the context changes nothing
  none, = evaluate(Constant(Bytes(), b' 12345'), tmp_path, tasks=('passkey',), lengths=(300,), samples=20)
  assert none.score.mean == 0


def test_a_line_has_all_that_is_needed_to_ask_again(tmp_path):
  evaluate(Constant(Bytes(), b' 12345 and more'), tmp_path, tasks=('passkey',), lengths=(4096,), samples=5,
           depths=3, seed=7, answers=True)
  lines = lines_of(tmp_path)
  assert [line['depth_asked'] for line in lines] == [0, 0.5, 1, 0, 0.5]
  for line in lines:
    again = example.example(line['task'], TASKS[line['task']], Bytes(), length=line['length'],
                            index=line['index'], seed=line['seed'], depth=line['depth_asked'],
                            haystack=line['haystack'])
    assert line['references'] == list(again.references) and line['depth'] == again.depth
    assert abs(line['depth'] - line['depth_asked']) < 0.05
    assert line['written'] == ' 12345'   # no more than an answer may take
    assert line['step'] == 3 and line['checkpoint'] == 'c'
    assert line['answer_logprob'] == pytest.approx(-6 * math.log(257)) and not line['answer_greedy']


def test_what_no_task_reads_is_refused_and_what_one_does_not_read_is_told(tmp_path, capsys):
  with pytest.raises(ConfigError, match=r"^eval\.haystack='noise': is read by none of parity, s3; leave it out, or "
                                        r'name a task that reads it: passkey, '):
    tasks.Config(tasks=('parity', 's3'), haystack='noise')
  tasks.Config(haystack='noise')   # held-out text is read; nothing is put
  settings = dict(tasks=('parity', 'passkey'), lengths=(300,), samples=2, haystack='noise')
  evaluate(Constant(Bytes(), b' 1'), tmp_path, **settings)
  assert capsys.readouterr().out.startswith(
      "eval.haystack='noise': not read by parity, whose text is their own\n")
  assert {line['task']: line['haystack'] for line in lines_of(tmp_path)} == dict(parity='', passkey='noise')


def test_an_answer_is_as_long_as_its_own_example_allows(tmp_path):
  evaluate(Constant(Bytes(), b'x' * 999), tmp_path, tasks=('mrcr_2',), lengths=(1300,), samples=4)
  lines = lines_of(tmp_path)
  assert len({line['new_tokens'] for line in lines}) > 1
  assert [len(line['written']) for line in lines] == [line['new_tokens'] for line in lines]


class Exactly(Constant):
  """Refuses what the model would: prompts that are too long together with the room of their longest answer."""

  def generate(self, prompts, max_new_tokens, stops=()):
    assert max(map(len, prompts)) + max_new_tokens <= self.max_length
    return super().generate(prompts, max_new_tokens, stops)


@pytest.mark.parametrize('task, length', [('mrcr_2', 1300), ('ruler_compat_fwe', 1024)])
def test_examples_as_long_as_the_model_are_asked_or_counted_each_by_itself(tmp_path, task, length):
  """Their answers are of different lengths; one in NVIDIA's form may be a token longer than asked for."""
  subject = Exactly(Bytes(), b'x' * 999)
  subject.max_length = length
  cell, = evaluate(subject, tmp_path, tasks=(task,), lengths=(length,), samples=6, too_long='count')
  lines = lines_of(tmp_path)
  assert [line['too_long'] for line in lines] == [line['prompt_tokens'] + line['new_tokens'] > length for line in lines]
  assert cell.too_long == sum(line['too_long'] for line in lines) < 6


def test_a_length_that_some_examples_do_not_fit_is_refused_at_the_start(tmp_path):
  asked = Counted(Constant(Bytes(), b''), 0)
  with pytest.raises(ConfigError, match=r'niah: length=300: must be at least \d+'):
    evaluate(asked, tmp_path, tasks=('niah',), lengths=(300,), samples=200)
  evaluate(Constant(Bytes(), b''), tmp_path, tasks=('passkey', 'niah'), lengths=(320, 384), samples=200)   # README's


class Counted:
  """Passes calls on, counts examples, and dies after so many calls."""

  def __init__(self, inner, calls=math.inf):
    self.inner, self.left, self.seen = inner, calls, 0
    self.tokenizer, self.max_length = inner.tokenizer, inner.max_length

  def generate(self, prompts, max_new_tokens, stops=()):
    self.left -= 1
    if self.left < 0:
      raise KeyboardInterrupt
    self.seen += len(prompts)
    return self.inner.generate(prompts, max_new_tokens, stops)


@pytest.mark.parametrize('calls', [0, 1, 2, 5])
def test_killed_and_started_again_is_one_run(tmp_path, calls):
  settings = dict(tasks=('parity', 's3'), lengths=(96, 128), samples=6)
  known = Oracle(Bytes(), examples(('parity', 's3'), (96,), 6))   # right at 96, wrong at 128
  straight = evaluate(known, tmp_path / 'a', **settings) if (tmp_path / 'a').mkdir() is None else None
  (tmp_path / 'b').mkdir()
  with pytest.raises(KeyboardInterrupt):
    evaluate(Counted(known, calls), tmp_path / 'b', **settings)
  done = len(lines_of(tmp_path / 'b')) if calls > 1 else 0
  assert done == {0: 0, 1: 0, 2: 4, 5: 6}[calls]
  with open(tmp_path / 'b' / 'tasks.jsonl', 'a') as file:
    file.write('{"key": "torn')
  again = Counted(known)
  assert evaluate(again, tmp_path / 'b', **settings) == straight
  assert again.seen == 2 * (24 - done)   # each question once, and its control
  assert (tmp_path / 'b' / 'tasks.jsonl').read_bytes() == (tmp_path / 'a' / 'tasks.jsonl').read_bytes()
  last = Counted(known)
  assert evaluate(last, tmp_path / 'b', **settings) == straight and last.seen == 0
  more = Counted(known)
  evaluate(more, tmp_path / 'b', **(settings | dict(samples=7)))
  assert more.seen == 2 * 4   # samples may grow


@pytest.mark.parametrize('change', [dict(seed=1), dict(controls=False), dict(answers=True),
                                    dict(about=ABOUT | dict(checkpoint='d')),
                                    dict(about=ABOUT | dict(model='n'))], ids=str)
def test_another_evaluation_counts_its_own_lines_alone(tmp_path, change):
  constant = Constant(Bytes(), b' odd')
  first, = evaluate(constant, tmp_path)
  other, = evaluate(Constant(Bytes(), b'neither'), tmp_path, **change)
  assert other.score.mean == 0 and other.count == 10
  assert len(lines_of(tmp_path)) == 20
  assert evaluate(Counted(constant, 0), tmp_path) == [first]   # all of its lines are still there


def test_another_text_at_the_same_path_is_another_evaluation_and_the_same_elsewhere_is_not(tmp_path):
  text, moved = tmp_path / 'text', tmp_path / 'moved'
  settings = dict(tasks=('passkey',), lengths=(320,), haystack=str(text), controls=False)
  text.write_text('Here is a sentence. And another one. ' * 20)
  moved.write_bytes(text.read_bytes())
  first, = evaluate(Constant(Bytes(), b''), tmp_path, **settings)
  old = lines_of(tmp_path)
  assert evaluate(Counted(Constant(Bytes(), b''), 0), tmp_path, **settings | dict(haystack=str(moved))) == [first]
  text.write_text('Here is a sentence. And a longer one. ' * 20)
  asked = Counted(Constant(Bytes(), b''))
  evaluate(asked, tmp_path, **settings)
  new = lines_of(tmp_path)[len(old):]
  assert asked.seen == len(new) == 10 and lines_of(tmp_path)[:10] == old
  assert {line['digests']['haystack'] for line in old} != {line['digests']['haystack'] for line in new}
  for before, after in zip(old, new):   # it is the new text that was read
    assert before['key'] != after['key'] and before['prompt_sha256'] != after['prompt_sha256']


def test_another_haystack_asks_those_alone_who_read_it(tmp_path):
  text = tmp_path / 'text'
  settings = dict(tasks=('parity', 'passkey'), lengths=(320,), controls=False, samples=4)
  text.write_text('Here is a sentence. And another one. ' * 20)
  evaluate(Constant(Bytes(), b''), tmp_path, haystack=str(text), **settings)
  for given in (dict(haystack=str(text)), dict(haystack='noise'), {}):
    before = lines_of(tmp_path)
    text.write_text('Here is a sentence. And a longer one. ' * 20)
    asked = Counted(Constant(Bytes(), b''))
    parity, passkey = evaluate(asked, tmp_path, **settings, **given)
    new = lines_of(tmp_path)[len(before):]
    assert asked.seen == 4 and {line['task'] for line in new} == {'passkey'}
    assert parity.count == passkey.count == 4
    assert set(new[0]['digests']) == ({'haystack'} if given.get('haystack') == str(text) else set())
    counted, others = report.newest(lines_of(tmp_path))   # the report has all that this command asked
    assert counted == before[:4] + new and others == len(before) - 4
  other = Counted(Constant(Bytes(), b''))
  evaluate(other, tmp_path, seed=1, **settings)
  assert other.seen == 8


def test_depths_are_of_tasks_that_place_a_needle_alone(tmp_path, capsys):
  with pytest.raises(ConfigError, match=r'^eval\.depths=2: is taken by none of parity, s3; leave it out, or name a task that takes '
                                        r'it: passkey, niah, '):
    tasks.Config(tasks=('parity', 's3'), depths=2)
  tasks.Config(depths=2)   # nothing is put
  settings = dict(tasks=('parity', 'passkey'), lengths=(320,), samples=4, controls=False, about=ABOUT | dict(overrides={}))
  found = evaluate(Constant(Bytes(), b''), tmp_path, **settings)
  old = lines_of(tmp_path)
  capsys.readouterr()
  asked = Counted(Constant(Bytes(), b''))
  evaluate(asked, tmp_path, depths=2, **settings)
  said, new = capsys.readouterr().out, lines_of(tmp_path)[8:]
  assert said.startswith('eval.depths=2: not taken by parity, where no needle is placed\n')
  assert asked.seen == 4 and {line['task'] for line in new} == {'passkey'}   # parity's prompts are the same
  assert [line['depth_asked'] for line in new] == [0, 1, 0, 1] and {line['depths'] for line in new} == {2}
  assert all(line['depth_asked'] is None and 'depths' not in line for line in old if line['task'] == 'parity')
  # The report has what one command asks, and names it.
  counted, others = report.newest(lines_of(tmp_path))
  assert counted == [*old[:4], *new] and others == 4
  config = dict(eval=dict(tasks=['parity', 'passkey'], lengths=[320], samples=4, depths=0, haystack=''))
  assert again.of_tasks(config, counted) == {'eval.depths': 2}
  # Whose depths were drawn before this was told apart is asked by the same key.
  assert evaluate(Counted(Constant(Bytes(), b''), 0), tmp_path, **settings) == found
  before = tasks._hash([ABOUT[name] for name in ('checkpoint', 'model', 'tokenizer')] + [0, 0, False, False])
  assert {line['settings'] for line in (*old, *new)} == {before}


def test_what_was_counted_as_too_long_is_asked_where_that_is_an_error(tmp_path):
  subject = Constant(Bytes(), b' odd')
  evaluate(subject, tmp_path, too_long='count', controls=False)
  lines = lines_of(tmp_path)
  lines[2] |= dict(too_long=True, score=None)
  (tmp_path / 'tasks.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  counted, = evaluate(Counted(subject, 0), tmp_path, too_long='count', controls=False)
  assert (counted.count, counted.too_long) == (9, 1)
  asked = Counted(subject)
  every, = evaluate(asked, tmp_path, controls=False)
  assert (every.count, every.too_long, asked.seen) == (10, 0, 1)


def test_examples_that_a_task_no_longer_makes_are_refused(tmp_path, monkeypatch):
  evaluate(Constant(Bytes(), b' odd'), tmp_path)
  monkeypatch.setattr(tasks, '_digest', lambda text: 'another')
  with pytest.raises(ConfigError, match=r"task 'parity' makes other examples of this seed than when"):
    evaluate(Constant(Bytes(), b' odd'), tmp_path)


def patched(monkeypatch, name, **change):
  monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], **change))


def remade(name, change):
  """A task's `make`, some of whose examples are others now."""
  made = TASKS[name].make
  return lambda draw: change(draw.index, made(draw))


@pytest.mark.parametrize('change, score', [
    (lambda one: dict(score=lambda text, made: 1.0), 1.0),
    (lambda one: dict(make=remade('parity', lambda i, made: dataclasses.replace(made, references=('odd',)))), 1.0),
    (lambda one: dict(score=one.score), None)], ids=['scorer', 'references', 'nothing'])
def test_kept_answers_have_the_score_that_their_task_gives_now(tmp_path, monkeypatch, capsys, change, score):
  first, = evaluate(Constant(Bytes(), b' odd'), tmp_path)
  before = lines_of(tmp_path)
  patched(monkeypatch, 'parity', **change(TASKS['parity']))
  for _ in range(2):   # once is enough
    found, = evaluate(Counted(Constant(Bytes(), b' odd'), 0), tmp_path)   # nothing is asked again
  assert 0 < first.score.mean < 1 and found.score.mean == (first.score.mean if score is None else score)
  after = lines_of(tmp_path)
  assert after[:10] == before and ('another score' in capsys.readouterr().out) == (score is not None)
  assert len(after) == 10 + (0 if score is None else sum(line['score'] == 0 for line in before))
  counted, _ = report.newest(after)
  assert np.mean([line['score'] for line in counted]) == np.mean([line['control_score'] for line in counted]) == found.score.mean
  assert [line['written'] for line in counted] == [line['written'] for line in before]


@pytest.mark.parametrize('field, change', [
    ('prompt', lambda made: dict(prompt=b'1' + made.prompt[1:] if made.prompt[:1] != b'1' else b'0' + made.prompt[1:])),
    ('target', lambda made: dict(target=b' other')), ('question', lambda made: dict(question=made.question - 1)),
    ('new_tokens', lambda made: dict(new_tokens=made.new_tokens - 1, prompt=made.prompt + b'.'))],
    ids=['prompt', 'target', 'question', 'new_tokens'])
def test_kept_answers_are_of_the_examples_of_now(tmp_path, monkeypatch, field, change):
  """All of them: longer than those that are made at the start, and not the first alone."""
  settings = dict(lengths=(2048,), samples=3, controls=False)
  evaluate(Constant(Bytes(), b' odd'), tmp_path, **settings)
  patched(monkeypatch, 'parity', make=remade(
      'parity', lambda i, made: dataclasses.replace(made, **change(made)) if i == 2 else made))
  with pytest.raises(ConfigError, match=r"tasks\.jsonl: task 'parity' makes other examples of this seed than when they were "
                                        r'answered, such as example 2 of 2048 tokens; remove the file, or give'):
    evaluate(Constant(Bytes(), b' odd'), tmp_path, **settings | dict(samples=5))
  assert len(lines_of(tmp_path)) == 3


def test_kept_answers_that_are_not_asked_for_stand_in_no_ones_way(tmp_path, monkeypatch):
  settings = dict(lengths=(2048,), controls=False)
  evaluate(Constant(Bytes(), b' odd'), tmp_path, samples=4, **settings)
  def make(i, made):
    if i == 3:
      raise ConfigError('only 3 questions are there')
    return made
  patched(monkeypatch, 'parity', make=remade('parity', make))
  found, = evaluate(Counted(Constant(Bytes(), b' odd'), 0), tmp_path, samples=3, **settings)
  assert found.count == 3
  with pytest.raises(ConfigError, match='only 3 questions are there'):
    evaluate(Counted(Constant(Bytes(), b' odd'), 0), tmp_path, samples=9, **settings)


def test_many_long_examples_are_compared_where_other_code_made_them(tmp_path, monkeypatch, capsys):
  settings = dict(lengths=(2048,), samples=3, controls=False)
  monkeypatch.setattr(tasks, 'CHEAP', 4096)
  evaluate(Constant(Bytes(), b' odd'), tmp_path, **settings)
  lines, made = lines_of(tmp_path), []
  monkeypatch.setattr(tasks, 'example', lambda *args, **kwargs: made.append(1) or example.example(*args, **kwargs))
  again = lambda: evaluate(Counted(Constant(Bytes(), b''), 0), tmp_path, **settings)
  again()
  assert len(made) == 2   # the first and the last of a length, always
  capsys.readouterr()
  for other in (dict(code='another'), {}):   # or of before it was kept
    (tmp_path / 'tasks.jsonl').write_text(''.join(
        json.dumps({k: v for k, v in line.items() if k not in ('code', 'example_sha256')} | other) + '\n' for line in lines))
    for count in (5, 2):   # once is enough
      made.clear()
      again()
      assert len(made) == count
      told = capsys.readouterr().out
      assert ('3 answers are of other code than this; their examples are made again' in told) == (count == 5)
      assert 'another score' not in told
  lines[1]['new_tokens'] += 1
  (tmp_path / 'tasks.jsonl').write_text(''.join(
      json.dumps({k: v for k, v in line.items() if k not in ('code', 'example_sha256')}) + '\n' for line in lines))
  with pytest.raises(ConfigError, match='such as example 1 of 2048 tokens'):
    again()


def test_the_code_of_a_task_is_known_where_it_is_of_the_house(monkeypatch):
  assert all(version.code_of(name) == version.code_of('parity') for name in TASKS)
  patched(monkeypatch, 'parity', score=functools.partial(lambda text, made, say: say, say=1.0))
  assert version.code_of('parity') is None and version.code_of('s3') is not None


def test_what_is_too_long_is_an_error_or_is_counted_and_never_cut(tmp_path):
  short = Constant(Bytes(), b' odd')
  short.max_length = 100
  with pytest.raises(ConfigError, match=r"eval\.lengths=\(128,\): must be at most model\.max_length=100; "
                                        r"set eval\.too_long='count'"):
    evaluate(short, tmp_path, lengths=(64, 128))
  assert not list(tmp_path.iterdir())
  a, b = evaluate(short, tmp_path, lengths=(64, 128), too_long='count')
  assert (a.count, a.too_long, b.count, b.too_long, b.score) == (10, 0, 0, 10, None)
  assert '| parity | 128 | - | - |' in (tmp_path / 'tasks.md').read_text()
  assert all(line['score'] is None for line in lines_of(tmp_path) if line['length'] == 128)


def test_a_length_too_short_for_a_task_is_refused_before_anything_is_asked(tmp_path):
  asked = Counted(Constant(Bytes(), b''), 0)
  with pytest.raises(ConfigError, match=r'passkey: length=64: must be at least \d+'):
    evaluate(asked, tmp_path, tasks=('parity', 'passkey'))


def test_progress_tells_the_time_left(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(course.Progress, 'EVERY', -1.0)
  evaluate(Constant(Bytes(), b''), tmp_path)
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith('parity at 64, example 4: 40 % of all tokens, ') and out[0].endswith(' left')
  evaluate(Constant(Bytes(), b''), tmp_path, samples=20)
  assert capsys.readouterr().out.startswith('carries on: 640 of 1,280 tokens were read before\n')


@pytest.mark.parametrize('settings, message', [
    (dict(tasks=('paskey',)), r"^eval\.tasks='paskey': must be one of .* \(did you mean \"passkey\"\?\)"),
    (dict(tasks=('s3', 's3')), r"^eval\.tasks=\('s3', 's3'\): has one twice"),
    (dict(lengths=(0,)), r'^eval\.lengths=0: must be at least 1'),
    (dict(samples=0), r'^eval\.samples=0: must be at least 1'),
    (dict(depths=11), r'^eval\.depths=11: must be at most eval\.samples=10'),
    (dict(batch_size=0), r'^eval\.batch_size=0: must be at least 1'),
    (dict(segment=0), r'^eval\.segment=0: must be at least 1'),
    (dict(seed=-1), r'^eval\.seed=-1: must be at least 0'),
    (dict(too_long='cut'), r"^eval\.too_long='cut': must be one of error, count"),
])
def test_mistakes(tmp_path, settings, message):
  with pytest.raises(ConfigError, match=message):
    evaluate(Constant(Bytes(), b''), tmp_path, **settings)


# The command.

RUN = ['--config=tests/programs/tiny.py:lstm', '--config.data.corpus=tasks', "--config.data.tasks=('parity',)",
       '--config.data.files=', '--config.data.split=hash', '--config.data.form=packed',
       '--config.data.length=48', '--config.run.num_steps=2', '--config.run.eval_every=0',
       '--config.run.checkpoint_every=2', '--config.optimizer.ema=0.9', '--config.perplexity.length=48', '--config.perplexity.segment=48']
EVAL = ['--mode=eval', "--config.eval.tasks=('parity','induction')", '--config.eval.lengths=(48,100)',
        '--config.eval.samples=8', '--config.eval.segment=32', '--config.eval.answers']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('trained')
  assert main.main(['main', *RUN, f'--workdir={folder}']) == 0
  return folder


def test_a_run_is_trained_on_tasks_and_put_to_tasks(trained, capfd):
  assert (trained / 'evaluation.json').exists()   # held-out text, since no task was named
  assert main.main(['main', *RUN, *EVAL, f'--workdir={trained}']) == 2
  assert 'induction: length=48: must be at least' in capfd.readouterr().err
  eval_args = [*EVAL[:2], '--config.eval.lengths=(64,100)', *EVAL[3:]]
  command = ['main', *RUN, *eval_args, f'--workdir={trained}']
  assert main.main(command) == 0
  out = capfd.readouterr().out
  lines = lines_of(trained)
  assert len(lines) == 32 and (trained / 'tasks.md').read_text() in out
  assert {(line['task'], line['length']) for line in lines} == {
      (task, length) for task in ('parity', 'induction') for length in (64, 100)}
  for line in lines:
    assert line['step'] == 2 and np.isfinite(line['answer_logprob'])
    assert line['control_written'] is not None and len(line['checkpoint']) == 16
    assert line['versions']['jax'] == jax.__version__ and line['commit'] == again.commit()
  # Killed after half of a line, on one device in place of eight: what is left is asked alone.
  whole = (trained / 'tasks.jsonl').read_bytes()
  (trained / 'tasks.jsonl').write_bytes(whole[:-30])
  assert main.main([*command, '--config.mesh.layout=single']) == 0
  assert 'carries on' in capfd.readouterr().out
  later = lines_of(trained)
  assert later[:-1] == lines[:-1]
  for field in ('key', 'prompt_sha256', 'written', 'score', 'control_written'):
    assert later[-1][field] == lines[-1][field]
  assert later[-1]['answer_logprob'] == pytest.approx(lines[-1]['answer_logprob'], rel=1e-4)


@pytest.mark.parametrize('args, message', [
    (['--config.eval.tasks=parety'], "eval.tasks='parety': must be one of"),
    (['--config.eval.tasks=parity,s3'], """eval.tasks='parity,s3': is one name; give them as "('parity', 's3')\""""),
    (['--config.eval.samples=0'], 'eval.samples=0: must be at least 1'),
    (['--config.eval.sample=3'], 'eval.sample: no such field'),
    (['--config.eval.tasks=parity', '--config.eval.batch_size=3'], 'eval.batch_size=3: mesh.data=8 must'),
    (['--config.eval.tasks=parity', '--config.eval.lengths=(64,)', '--config.model.max_length=60',
      '--allow_config_change=model.max_length'], 'eval.lengths=(64,): must be at most model.max_length=60'),
])
def test_mistakes_on_the_command_line(trained, capfd, args, message):
  capfd.readouterr()
  assert main.main(['main', *RUN, '--mode=eval', *args, f'--workdir={trained}']) == 2
  err = capfd.readouterr().err
  assert message in err and err.count('\n') == 1


def command_of(folder, kind, config='CONFIG'):
  """The words of a command in the report, after `python -m`."""
  text = (folder / 'report.html').read_text()
  found = re.search(rf'<h3>{kind}</h3>\s*<pre class=command>\n(.*?)</pre>', text, re.DOTALL)
  words = shlex.split(html.unescape(found[1]))
  assert words[:4] == ['python', '-m', 'longctx.main', f'--config={config}']
  return words[4:]


def parsed(words):
  """The config of a command line, as JSON."""
  _, config = command_line.parse_with_config(main.define_flags, ['main', *words])
  return workdir.plain(config)


OVERRIDES = ['--config.perplexity.use_ema', '--config.eval.seed=3', '--config.eval.depths=2',
             '--config.eval.controls=false', '--config.eval.answers', '--config.eval.batch_size=16',
             '--config.eval.too_long=count', '--config.perplexity.max_tokens=99', '--config.mesh.layout=single',
             '--config.model.max_length=2000', '--config.run.num_steps=7',
             '--allow_config_change=model.max_length']


def test_the_printed_command_gives_the_same_config_and_the_same_answers(trained, tmp_path, capfd):
  folder = tmp_path / 'w'
  shutil.copytree(trained, folder)
  for name in ('tasks.jsonl', 'report.html'):
    (folder / name).unlink(missing_ok=True)
  (tmp_path / 'text').write_text('Here is a sentence. And another one. ' * 20)
  given = [*RUN, '--mode=eval', *OVERRIDES, f'--workdir={folder}', "--config.eval.tasks=('passkey',)",
           '--config.eval.lengths=(320,)', '--config.eval.samples=4', f'--config.eval.haystack={tmp_path}/text']
  assert main.main(['main', *given]) == 0
  # CONFIG: a file that gives the run's config.
  (tmp_path / 'config.py').write_text('from longctx.training import workdir\n'
                                      f'get_config = lambda: workdir.load_config({str(folder)!r})\n')
  words = [f'--config={tmp_path}/config.py', *command_of(folder, 'Tasks')]
  assert parsed(words) == parsed(given)
  lines = lines_of(folder)
  assert lines[0]['use_ema'] and lines[0]['overrides']['perplexity.use_ema'] is True
  capfd.readouterr()
  assert main.main(['main', *words]) == 0   # answered from what is there
  assert 'carries on: 1,280 of 1,280' in capfd.readouterr().out and lines_of(folder) == lines
  (folder / 'tasks.jsonl').unlink()
  assert main.main(['main', *words]) == 0   # and anew
  assert [line | dict(overrides=0) for line in lines_of(folder)] == [line | dict(overrides=0) for line in lines]
  # The same for held-out text.
  given = [*RUN, '--mode=eval', f'--workdir={folder}', '--config.perplexity.use_ema', '--config.perplexity.max_tokens=99']
  assert main.main(['main', *given]) == 0
  report.write(str(folder))
  words = [f'--config={tmp_path}/config.py', *command_of(folder, 'Held-out text')]
  assert parsed(words) == parsed(given)
  assert json.loads((folder / 'evaluation.json').read_text())['overrides'] == {
      'perplexity.use_ema': True, 'perplexity.max_tokens': 99}


def test_the_command_gives_the_config_of_then_where_the_run_has_another_now(trained, tmp_path, capfd):
  folder = tmp_path / 'w'
  shutil.copytree(trained, folder)
  (folder / 'tasks.jsonl').unlink(missing_ok=True)
  given = [*RUN, '--mode=eval', f'--workdir={folder}', '--config.eval.lengths=(64,)', '--config.eval.samples=2',
           '--config.perplexity.max_tokens=99']
  assert main.main(['main', *given]) == 0
  given = [*given, "--config.eval.tasks=('parity',)"]
  assert main.main(['main', *given]) == 0
  lines, held_out = lines_of(folder), json.loads((folder / 'evaluation.json').read_text())
  kept = {path.stem for path in (folder / 'configs').iterdir()}
  assert {lines[0]['config'], held_out['config']} <= kept
  run = json.loads((folder / 'config.json').read_text())
  run['model']['max_length'] = 3000   # as --allow_config_change leaves it
  (folder / 'config.json').write_text(json.dumps(run))
  report.write(str(folder))
  page = (folder / 'report.html').read_text()
  assert 'config.json has changed since' not in page and 'CONFIG' not in page
  words = command_of(folder, 'Tasks', f'{folder}/configs/{lines[0]["config"]}.json')
  assert '--allow_config_change=model.max_length' in words and not any(word.startswith('--config.') for word in words)
  words = [f'--config={folder}/configs/{lines[0]["config"]}.json', *words]
  assert parsed(words) == parsed(given)
  capfd.readouterr()
  assert main.main(['main', *words]) == 0   # answered from what is there
  assert 'carries on: 128 of 128' in capfd.readouterr().out and lines_of(folder) == lines
  words = command_of(folder, 'Held-out text', f'{folder}/configs/{held_out["config"]}.json')
  assert again.digest(parsed([f'--config={folder}/configs/{held_out["config"]}.json', *words])) == held_out['config']
  # Where it was not kept, it is said.
  shutil.rmtree(folder / 'configs')
  report.write(str(folder))
  assert 'config.json has changed since: give as CONFIG' in (folder / 'report.html').read_text()


@pytest.mark.parametrize('override, same', [
    ('--config.perplexity.use_ema', False), ('--config.model.layer_norm', False), ('--config.eval.depths=2', False),
    ('--config.model.dropout=0.5', True), ('--config.perplexity.max_tokens=9', True), ('--config.eval.batch_size=16', True)])
def test_what_changes_an_answer_is_of_its_key_and_nothing_else(trained, override, same, monkeypatch):
  """All but the checkpoint and the tokenizer, of which tests above tell."""
  def key(*more):
    _, config = command_line.parse_with_config(main.define_flags, ['main', *RUN, "--config.eval.tasks=('passkey',)", *more])
    a = assembly.assemble(config)
    about = examine.about(a, config, str(trained), 2)
    return tasks.task_keys(a.parts.eval, tasks.settings_key(a.parts.eval, about), dict(passkey={}))
  assert (key() == key(override)) == same
