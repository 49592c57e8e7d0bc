"""Questions about documents: of SQuAD and HotpotQA files, and of the invented ones, which a reader
answers."""

import collections
import itertools
import json
import re

import numpy as np
import pytest

from longctx.data.tasks import example, paragraphs
from longctx.data.tasks.ruler import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError

SQUAD = {'version': 'v2.0', 'data': [
    {'title': 'Rivers', 'paragraphs': [
        {'context': f'The river number {i} is {100 + i} miles long.', 'qas': [
            {'question': f'How long is river {i}?', 'is_impossible': False,
             'answers': [{'text': f'{100 + i} miles', 'answer_start': 0},
                         {'text': f'{100 + i}', 'answer_start': 0},
                         {'text': f'{100 + i}', 'answer_start': 0}]},
            {'question': f'Who swam in river {i}?', 'is_impossible': True, 'answers': []}]}
        for i in range(3)]},
    {'title': 'Hills', 'paragraphs': [
        {'context': f'The hill number {i} is Mount {chr(65 + i)}.', 'qas': []}
        for i in range(20)]}]}
HOTPOT = [
    {'question': f'Where was the singer of song {i} born?', 'answer': f'Town {i}',
     'supporting_facts': [[f'Song {i}', 0], [f'Singer {i}', 1], [f'Song {i}', 1]],
     'context': [[f'Other {i}', ['No song.']],
                 [f'Song {i}', [f'Song {i} is sung', f' by singer {i}.']],
                 ['Shared', ['Everybody knows this.']],
                 [f'Singer {i}', ['He sings.', f' Born in Town {i}.']]]}
    for i in range(3)]


@pytest.fixture
def files(tmp_path):
  (tmp_path / 'squad.json').write_text(json.dumps(SQUAD))
  (tmp_path / 'hotpot.json').write_text(json.dumps(HOTPOT))
  return str(tmp_path / '*.json')


def draw(name, length=2000, index=0, **kwargs):
  return example.example(name, TASKS[name], Bytes(), length=length, index=index, **kwargs)


def documents_of(one):
  """The numbered documents, as they stand in the prompt; the last one may be cut."""
  context = one.prompt[:one.question].decode().split('given documents.\n\n')[-1]
  found = re.split(r'(?:^|\n\n)Document (\d+):\n', context)
  assert [int(i) for i in found[1::2]] == [*range(1, len(found) // 2 + 1)]
  return found[2::2]


def test_squad_is_read_as_published(files):
  given = paragraphs.read(files, 'SQuAD')
  assert len(given.documents) == 23 and len(given.questions) == 3
  second = given.questions[1]
  assert second.text == 'How long is river 1?' and second.answers == ('101 miles', '101')
  assert given.documents[second.golds[0]] == b'The river number 1 is 101 miles long.'
  assert {given.documents[i][:18] for i in second.near} == {
      b'The river number 0', b'The river number 2'}


def test_hotpotqa_is_read_as_published(files):
  given = paragraphs.read(files, 'HotpotQA')
  assert len(given.documents) == 3 * 3 + 1   # one is shared
  last = given.questions[2]
  assert last.answers == ('Town 2',)
  assert [given.documents[i] for i in last.golds] == [
      b'Song 2\nSong 2 is sung by singer 2.', b'Singer 2\nHe sings. Born in Town 2.']
  assert {given.documents[i][:6] for i in last.near} == {b'Other ', b'Shared'}


def test_one_paragraph_among_those_of_its_file(files):
  asked = collections.Counter()
  for index in range(3):
    one = draw('ruler_qa_1', index=index, paragraphs=files)
    told = documents_of(one)
    i = int(re.search(r'How long is river (\d)', one.prompt[one.question:].decode())[1])
    asked[i] += 1
    gold = f'The river number {i} is {100 + i} miles long.'
    assert one.references == (f'{100 + i} miles', f'{100 + i}')
    assert one.target == f' {100 + i} miles'.encode()
    assert told.count(gold) == 1   # though the others go round and round
    (start, stop), = one.needles
    assert one.prompt[start:stop].decode() == f'Document {told.index(gold) + 1}:\n{gold}'
    others = [text for text in told[:-1] if text != gold]
    times = collections.Counter(others).values()
    assert len(times) == 22 and max(times) - min(times) <= 1
    assert one.info == dict(documents='SQuAD')
  assert asked == {0: 1, 1: 1, 2: 1}


def test_paragraphs_of_the_same_article_come_first(files):
  one = draw('ruler_qa_1', length=600, paragraphs=files)
  told = documents_of(one)[:-1]
  assert 3 <= len(told) < 10 and sum(text.startswith('The river') for text in told) == 3


def test_two_documents_that_are_needed_stand_at_their_own_depths(files):
  gaps = set()
  for seed, index in itertools.product(range(4), range(3)):
    one = draw('ruler_qa_2', index=index, seed=seed, paragraphs=files)
    told = documents_of(one)
    i = re.search(r'song (\d) born', one.prompt[one.question:].decode())[1]
    golds = [f'Song {i}\nSong {i} is sung by singer {i}.',
             f'Singer {i}\nHe sings. Born in Town {i}.']
    assert [told.count(gold) for gold in golds] == [1, 1]
    assert [one.prompt[a:b].decode().split('\n', 1)[1] for a, b in one.needles] == golds
    gaps.add(told.index(golds[1]) - told.index(golds[0]))
  assert len(gaps) > 4 and min(gaps) < 0 < max(gaps)


def test_questions_come_in_another_order_for_another_seed(files):
  references = lambda i, seed: draw('ruler_qa_1', index=i, paragraphs=files, seed=seed).references
  orders = {seed: [references(i, seed) for i in range(3)] for seed in range(6)}
  assert len({*map(str, orders.values())}) > 2
  assert all(len({*order}) == 3 for order in orders.values())


def test_a_question_is_put_once_and_then_the_next_is_refused(files):
  """More would be counted as independent samples, and are none."""
  for task, kind in (('ruler_qa_1', 'SQuAD'), ('ruler_qa_2', 'HotpotQA')):
    for setting, samples in (('eval.{}', r'eval\.samples'), ('--{}', '--samples')):
      with pytest.raises(ConfigError, match=rf"^{setting.format('paragraphs')}='.*': {task}: example 3: only 3 questions "
                                            rf'of {kind} are there, each once; set {samples} to at most'):
        draw(task, index=3, paragraphs=files, setting=setting)
  assert draw('ruler_qa_1', index=3).info == dict(documents='synthetic')   # of which there is no end


@pytest.mark.parametrize('content, said', [
    ('{"data": [', 'is not JSON'),
    ('{"rows": []}', "neither SQuAD nor HotpotQA .* KeyError 'data'"),
    ('[{"question": "", "context": [[1]]}]', 'no file holds questions of SQuAD'),
    (json.dumps({'data': []}), 'no file holds questions of SQuAD'),
    (json.dumps(HOTPOT), 'no file holds questions of SQuAD'), ('7', 'neither SQuAD nor HotpotQA')])
def test_other_files_are_refused(tmp_path, content, said):
  (tmp_path / 'some.json').write_text(content)
  with pytest.raises(ConfigError, match=rf"^eval\.paragraphs='.*some\.json': .*{said}"):
    draw('ruler_qa_1', paragraphs=str(tmp_path / 'some.json'))


def test_a_file_that_is_not_there_or_has_one_document_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='no file matches; give SQuAD or HotpotQA JSON files'):
    draw('ruler_qa_1', paragraphs=str(tmp_path / 'none.json'))
  alone = {'data': [{'title': '', 'paragraphs': SQUAD['data'][0]['paragraphs'][:1]}]}
  (tmp_path / 'alone.json').write_text(json.dumps(alone))
  with pytest.raises(ConfigError, match=r"^--paragraphs='.*': holds no documents but those of one question"):
    draw('ruler_qa_1', paragraphs=str(tmp_path / 'alone.json'), setting='--{}')


def told_of(text, name):
  """What an invented paragraph says of a town, by what is asked."""
  return {'In which year': re.search(r'founded in (\d{4})', text),
          'What is': re.search(r'making (\w+)\.', text),
          'On which river': re.search(r'river (\w+)', text),
          'In which month': re.search(r'every (\w+)\.', text)}


@pytest.mark.parametrize('name', ['ruler_qa_1', 'ruler_qa_2'])
def test_a_reader_of_the_invented_documents_answers(name):
  kinds = collections.Counter()
  for index in range(30):
    one = draw(name, 3000, index)
    told = documents_of(one)
    question = one.prompt[one.question:].decode().split('Question: ')[1]
    town = re.search(r'(?:was|is|does|of) ([A-Z]\w+) (?:founded|known|lie|held)', question)
    if name == 'ruler_qa_2':
      person = re.search(r'the town where (\w+ \w+) was born', question)[1]
      born, = [text for text in told if text.startswith(f'{person}\n')]
      assert question.count('the town where') == 1 and town is None
      town = re.search(r'who was born in (\w+)\.$', born)[1]
    else:
      town = town[1]
    text, = [text for text in told if re.match(rf'({town}\n)?{town} (was founded|lies)', text)]
    kind = next(kind for kind in told_of(text, town) if question.startswith(kind))
    kinds[kind] += 1
    assert told_of(text, town)[kind][1] == one.references[0] == one.target.decode().strip()
    assert len(one.needles) == (2 if name == 'ruler_qa_2' else 1)
    assert one.info == dict(documents='synthetic')
  assert len(kinds) == 4


def test_the_floor_is_of_a_guess_among_what_an_answer_may_be():
  """A guess is right as often as one of its list is drawn; no answer is part of another."""
  lists = dict(year=[*map(str, paragraphs.YEARS)], good=paragraphs.GOODS, river=paragraphs.RIVERS,
               month=paragraphs.MONTHS)
  for name in ('ruler_qa_1', 'ruler_qa_2'):
    floor = np.mean([1 / len(values) for values in lists.values()])
    assert TASKS[name].floor == pytest.approx(floor)
  everything = [value.lower() for values in lists.values() for value in values]
  assert not [(a, b) for a in everything for b in everything if a != b and a in b]
  drawn = paragraphs.towns(np.random.default_rng(0), ['Here'] * 4000)
  for kind, values in lists.items():
    found = collections.Counter(getattr(town, kind) for town in drawn)
    assert {*found} <= {*values} and max(found.values()) < 2 * 4000 / len(values) + 20
