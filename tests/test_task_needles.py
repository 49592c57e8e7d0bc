"""What each needle and retrieval task says, against what is written by hand, and where its needles
stand."""

import collections
import itertools
import json
import re

import numpy as np
import pytest

from longctx.data.tasks import associations, coreference, example, needles, retrieval, ruler
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError


def draw(name, length=2048, index=0, **kwargs):
  return example.example(name, TASKS[name], Bytes(), length=length, index=index, **kwargs)


def context(one):
  return one.prompt[:one.question].decode()


def question(one):
  return one.prompt[one.question:].decode()


def needle(one, i=0):
  start, stop = one.needles[i]
  return one.prompt[start:stop].decode()


def test_passkey_is_the_published_prompt():
  one = draw('passkey', length=400, depth=1)
  key, = one.references
  assert one.prompt.decode().startswith(
      'There is an important info hidden inside a lot of irrelevant text. Find it and memorize '
      'them. I will quiz '
      'you about the important information there.\nThe grass is green. The sky is blue. The sun '
      'is yellow. Here we '
      'go. There and back again. ')
  assert question(one) == '\nWhat is the pass key? The pass key is'
  assert needle(one) == f'The pass key is {key}. Remember it. {key} is the pass key. '
  assert one.target.decode() == f' {key}' and re.fullmatch(r'[1-9]\d{4}', key)
  assert context(one).count(key) == 2


def test_niah_asks_for_one_city_in_the_words_of_lwm():
  one = draw('niah', depth=1)
  found, = one.references
  city = re.fullmatch(rf'\nThe special magic (.+) number is: {found}\n', needle(one)).group(1)
  assert question(one) == (
      f" What is the special magic {city} number? Don't give information outside the document or "
      f"repeat your "
      f'findings. Keep your response short and direct. ASSISTANT: The special magic {city} number '
      f'is:')
  assert context(one).startswith('You are a helpful assistant. USER: The grass is green. ')
  assert re.fullmatch(r'[1-9]\d{6}', found) and context(one).count('special magic') == 1
  assert len(set(needles.CITIES)) == len(needles.CITIES)


def test_niah_multi_hides_four_and_asks_for_two():
  one = draw('niah_multi')
  pairs = dict(re.findall(r'\nThe special magic (.+) number is: (\d{7})\n', context(one)))
  first, second = (re.search('magic (.+) number', needle(one, i)).group(1) for i in range(2))
  assert len(pairs) == 4
  assert one.references == (pairs[first], pairs[second])
  assert question(one).endswith(f'The special magic {first} and {second} numbers are:')
  assert TASKS['niah_multi'].score(f' {pairs[second]}', one) == 0.5


@pytest.mark.parametrize('name, count', [('passkey', 1), ('niah', 1), ('niah_multi', 2),
                                         ('association', 1)])
def test_needles_stand_whole_between_two_sentences(name, count):
  for index in range(20):
    one = draw(name, index=index)
    assert len(one.needles) == count
    for start, stop in one.needles:
      assert re.search(r'(?s)([.\n]|: ) ?$', one.prompt[:start].decode())
      assert one.prompt[stop - 1:stop] in b' \n'
      assert re.match('[A-Z\n]', one.prompt[stop:].decode())


@pytest.mark.parametrize('name', ['passkey', 'niah', 'niah_multi', 'association', 'json_kv', 'mrcr_2',
                                  *(name for name in ruler.TASKS if 'niah' in name or 'qa' in name)])
def test_depths_of_two_hundred_are_uniform(name):
  depths = np.sort([draw(name, 4096, index).depth for index in range(200)])
  grid = np.arange(201) / 200
  # 1 %
  assert max(np.abs(depths - grid[1:]).max(),
             np.abs(depths - grid[:-1]).max()) < 1.63 / np.sqrt(200)


@pytest.mark.parametrize('name', ['passkey', 'niah'])
def test_an_asked_depth_is_met_within_a_sentence(name):
  for depth in np.linspace(0, 1, 11):
    one = draw(name, 4096, depth=depth)
    assert one.depth == pytest.approx(depth, abs=60 / 3700)
    head = len(needles.PASSKEY_HEAD if name == 'passkey' else needles.LWM_HEAD)
    assert (one.needles[0][0] - head) / (one.question - head) == pytest.approx(depth,
                                                                               abs=110 / 3700)


def test_a_number_that_the_haystack_holds_is_drawn_again(tmp_path):
  drawn = example.Draw(rng=np.random.default_rng(0), tokenizer=Bytes(), length=99, index=0)
  text = ' '.join(str(n) for n in range(10, 100) if n not in (37, 64)).encode()
  assert {needles.number(drawn, 2, text) for _ in range(20)} == {'37', '64'}
  (tmp_path / 'x.txt').write_text(' '.join(f'{n}.' for n in range(10_000, 30_000)))
  for index in range(20):
    one = draw('passkey', 70_000, index, haystack=f'{tmp_path}/x.txt')
    assert context(one).count(one.references[0]) == 2


def test_a_haystack_of_all_the_numbers_is_refused(monkeypatch):
  drawn = example.Draw(rng=np.random.default_rng(0), tokenizer=Bytes(), length=99, index=0, haystack='x',
                       setting='data.task_{}')
  for text, taken in ((b'123456789', ()), (b'1234567', ('8', '9'))):
    with pytest.raises(ConfigError, match=r"^data\.task_haystack='x': holds each of 1000 numbers of 1 digits"):
      needles.number(drawn, 1, text, taken)
  # Of a task that hides four there are two.
  calls = itertools.count()
  def few(draw, digits, text, *taken):
    assert next(calls) < 99, 'there is no end'
    return needles.number(draw, 1, b'1234567', *taken)
  monkeypatch.setattr(ruler, 'number', few)
  with pytest.raises(ConfigError, match=r'^eval\.haystack=.*: holds each of 1000'):
    example.example('ruler_niah_multivalue', ruler.TASKS['ruler_niah_multivalue'], Bytes(), length=2000, index=0)


@pytest.mark.parametrize('name, step', [('association', 1), ('association2', 2)])
def test_associations_have_one_answer_and_no_word_in_common(name, step):
  seen = collections.Counter()
  for index in range(60):
    one = draw(name, index=index)
    pairs = re.findall(r'Nowadays (\w+) lives beside (.+?)\. ', context(one))
    facts = {place[0]: place for place in associations.PLACES}
    asked = re.fullmatch(r'\nQuestion: Which person has been to (.+)\?\nAnswer by a name:',
                         question(one)).group(1)
    assert len(pairs) == len({person for person, _ in pairs}) == 4
    assert [person for person, place in pairs
            if facts[place][step] == asked] == list(one.references)
    assert set(one.info['choices']) == {person for person, _ in pairs}
    said = {word for pair in pairs for word in ' '.join(['Nowadays lives beside',
                                                         *pair]).lower().split()}
    assert not said & set(re.sub(r'[?:\n]', ' ', question(one)).lower().split())
    seen[facts[dict(pairs)[one.references[0]]][0]] += 1
  assert len(seen) > 25   # all places are asked for


def test_a_shared_word_is_a_fault():
  associations.apart(['Anna lives here. '], 'Who is there?')
  with pytest.raises(AssertionError, match=r"share \['anna'\]"):
    associations.apart(['Bob, too. ', 'ANNA lives here. '], 'Where is (anna)?')


def test_no_fact_makes_a_question_with_a_shared_word():
  for place in associations.PLACES:
    for one in associations.PLACES:
      for step in (1, 2):
        if one[2] != place[2] or one == place:
          associations.apart([f'Nowadays Anna lives beside {one[0]}. '],
                             f'Which person has been to {place[step]}?')
  assert len({place[0] for place in associations.PLACES}) == len(associations.PLACES) == 42


def test_a_haystack_with_all_the_names_is_refused(tmp_path):
  (tmp_path / 'x.txt').write_text('. '.join(associations.NAMES[:-3]) + '. ')
  with pytest.raises(ConfigError, match=r"^eval\.haystack='.*': holds all but 3 of the names of "
                                        r"association, 4"):
    draw('association', haystack=f'{tmp_path}/x.txt')
  with pytest.raises(ConfigError, match=r"^data\.task_haystack='.*': holds all but 3"):
    draw('association', haystack=f'{tmp_path}/x.txt', setting='data.task_{}')


def test_json_is_valid_and_holds_the_pair_once():
  for length in (700, 2048, 2049, 2090):
    one = draw('json_kv', length)
    data = re.search(r'(?s)JSON data:\n(.*)$', context(one)).group(1)
    pairs = json.loads(data, object_pairs_hook=list)
    keys = [key for key, _ in pairs]
    uuid = r'[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}'
    others = 1 + len(one.target) + len(retrieval.KV_HEAD) + len(question(one)) + len('"note": ""}')
    assert keys.pop() == 'note' and len(set(keys)) == len(keys) == (length - others) // 81
    assert all(re.fullmatch(uuid, one) for pair in pairs[:-1] for one in pair)
    key = re.fullmatch(rf'\n\nKey: "({uuid})"\nCorresponding value:', question(one)).group(1)
    assert one.references == (dict(pairs)[key],)
    assert one.target.decode() == f' "{dict(pairs)[key]}"'
    assert TASKS['json_kv'].score(f'"{dict(pairs)[key].upper()}"', one) == 1


def documents(one):
  found = re.findall(r'(?s)ID: (\d{6}) \| TITLE: (.*?) \| CONTENT: (.*?) \| END ID: (\d{6})\n',
                     context(one))
  assert all(begin == end for begin, _, _, end in found)
  return {number: (title, content) for number, title, content, _ in found}


def test_one_document_of_the_corpus_answers_the_query():
  for index in range(10):
    one = draw('corpus_in_context', 4096, index)
    corpus = documents(one)
    assert len(corpus) == context(one).count('| TITLE:') > 10
    builder, stuff = re.search(r'query: What did (\w+) build of (\w+)\?\nFinal Answer:$',
                               question(one)).groups()
    fits = [number for number, (_, content) in corpus.items() if f'{builder} built it of {stuff} '
                                                                 f'in ' in content]
    assert fits == list(one.references)
    assert context(one).count(builder) == 1


def test_the_corpus_may_be_passages_of_any_text(tmp_path):
  (tmp_path / 'x.txt').write_text(''.join(f'Sentence {i} is about {i * 7919 % 1000} horses. '
                                          for i in range(90)))
  for index in range(10):
    one = draw('corpus_in_context', 2600, index, haystack=f'{tmp_path}/x.txt')
    corpus = documents(one)
    sentence = re.search(r'query: (.*)\nFinal Answer:$', question(one)).group(1)
    assert [number for number, (_, content) in corpus.items()
            if sentence in content] == list(one.references)
  for repeated in ('repeated', f'{tmp_path}/y.txt'):
    (tmp_path / 'y.txt').write_text('It is the same again and again and again. ' * 9)
    with pytest.raises(ConfigError, match=r"^--haystack='.*': no sentence of it is of 24 bytes and seldom enough"):
      draw('corpus_in_context', haystack=repeated, setting='--{}')


def test_invented_names_differ():
  names = retrieval.invented(np.random.default_rng(0), 5000)
  assert len(set(names)) == 5000 and all(re.fullmatch('[A-Z][a-z]{6,11}', name) for name in names)


@pytest.mark.parametrize('count', [2, 4, 8])
def test_mrcr_asks_for_the_ith_answer_to_the_same_request(count):
  ordinals = ['first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth']
  asked = set()
  for index in range(30):
    one = draw(f'mrcr_{count}', 6000, index)
    rounds = re.findall(r'User: (.*)\nAssistant: (.*)\n\n', context(one))
    mark, ordinal, kind, topic = re.fullmatch(
        r'User: Write (\w{12}) and then, word for word, the (\w+) (\w+) about (\w+) that you '
        r'wrote\.\nAssistant:',
        question(one)).groups()
    answers = [said for request, said in rounds if request == f'Write a {kind} about {topic}.']
    assert len(set(answers)) == count and mark not in context(one)
    assert one.target.decode() == f' {mark} {answers[ordinals.index(ordinal)]}'
    assert sorted(one.info['choices']) == sorted(f'{mark} {said}' for said in answers)
    assert all(coreference.LEAST <= len(said) < 350 for said in answers)
    assert sum(topic in said for _, said in rounds) == count   # no other round is about it
    asked.add(ordinal)
  assert asked == set(ordinals[:count])


def test_mrcr_floors():
  """Of one who says any of the answers; what two unlike ones share is the same for 2, 4 and 8."""
  for count, floor in ((2, 0.54), (4, 0.315), (8, 0.2)):
    task = TASKS[f'mrcr_{count}']
    ones = [draw(f'mrcr_{count}', 4096, index) for index in range(64)]
    scores = [np.mean([task.score(said, one) for said in one.info['choices']]) for one in ones]
    assert task.floor == floor
    assert np.mean(scores) == pytest.approx(floor, abs=3 * np.std(scores) / 8)
