"""RULER, balanced: prompts are solved from their text alone, by readers written for that."""

import collections
import functools
import json
import pathlib
import re
import sysconfig

import numpy as np
import pytest

from longctx.data import tokenizer
from longctx.data.tasks import example, ruler_compat, ruler_prompts, ruler_words, words
from longctx.data.tasks.ruler import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError

NEEDLE = re.compile(r'One of the special magic (?:numbers|uuids) for (\S+) is: ([0-9a-f-]+)\.')


class Words:
  """A token for each run of letters or digits, and for each other character that is no space."""

  def encode(self, data):
    return np.array(re.findall(rb'\w+|[^\w\s]', data), object)

  def num_bytes(self, ids):
    return np.full(len(ids), 8)

  vocab_size = 1


@functools.cache
def draw(name, length=4096, index=0, tok=Bytes, **kwargs):
  return example.example(f'ruler_{name}', TASKS[f'ruler_{name}'], tok(), length=length,
                         index=index, **kwargs)


def ranks(one):
  """Words of fwe's context with their counts, the most frequent first."""
  context = parts(one)[0].split('most frequently appeared coded words. ')[1]
  return collections.Counter(context.split(' ')).most_common()


def parts(one):
  """(the text before the question, the question)."""
  return one.prompt[:one.question].decode(), one.prompt[one.question:].decode()


def values_of(one):
  """What the needles say of the keys that the question names."""
  context, question = parts(one)
  asked = re.search(r'for (.*?) mentioned', question)[1]
  told = collections.defaultdict(list)
  for key, value in NEEDLE.findall(context):
    told[key].append(value)
  return [value for key in re.split(r',(?: and)? ', asked) for value in told[key]], told


@pytest.mark.parametrize('name, keys, answers', [
    ('niah_single_1', 1, 1), ('niah_single_2', 1, 1), ('niah_single_3', 1, 1),
    ('niah_multikey_1', 4, 1), ('niah_multikey_2', 30, 1), ('niah_multikey_3', 15, 1),
    ('niah_multivalue', 1, 4), ('niah_multiquery', 4, 4)])
def test_a_reader_of_needles_finds_what_is_asked_for(name, keys, answers):
  for index in range(8):
    one = draw(name, index=index)
    found, told = values_of(one)
    assert sorted(found) == sorted(one.references) and len(found) == answers
    assert found == [*one.references] == re.findall(r'[0-9a-f-]{7,}', one.target.decode())
    assert len(told) >= keys and (len(told) == keys or 'multikey' in name)
    everything = [value for values in told.values() for value in values]
    assert len(set(everything)) == len(everything)
    form = r'[0-9a-f-]{36}' if b'magic uuid' in one.prompt else r'\d{7}'
    assert all(re.fullmatch(form, value) for value in everything)
    assert [NEEDLE.search(one.prompt[a:b].decode())[2] for a, b in sorted(one.needles)] == [
        value for _, value in NEEDLE.findall(parts(one)[0]) if value in one.references]


def test_the_words_around_the_context_are_the_published_ones():
  count = lambda text: len(text) // 4
  for name in ('niah_single_1', 'niah_multikey_3', 'vt', 'fwe'):
    theirs = next(ruler_compat.samples(f'ruler_compat_{name}', count, 4096))
    one = draw(name)
    unkeyed = lambda text: re.sub(r'[0-9a-f]{8}-[0-9a-f-]+|\w+-\S+(?= mentioned)|\d{5}', '#', text)
    assert unkeyed(parts(one)[1]) == unkeyed(theirs.question)
    assert one.prompt.decode().startswith(theirs.prompt[:60])


def test_a_reader_of_assignments_finds_every_name_of_the_value():
  for index in range(8):
    one = draw('vt', index=index)
    context, question = parts(one)
    value = re.search(r'assigned the value (\d{5}) in', question)[1]
    own = context.split('\n\nMemorize')[1]   # after the worked example
    names, told = [], re.findall(r'VAR (\w+) = (?:VAR )?(\w+)\n', own)
    for name, source in told:
      if source == value or source in names:
        names.append(name)
    assert names == [*one.references] == one.target.decode().split() and len(set(names)) == 5
    shown = context.split('\n\nMemorize')[0]
    assert shown.count('The grass is green') == 5 and value not in shown
    answer = shown.split('they are: ')[1].split()
    shown_value = re.search(r'the value (\d{5}) in', shown)[1]
    assert answer == re.findall(r'VAR (\w+) = ', shown)
    assert f'VAR {answer[0]} = {shown_value}\n' in shown
    assert not {*answer} & {*names}


def test_vt_starts_where_it_was_asked_to():
  for depth in (0.0, 0.3, 0.9):
    one = draw('vt', length=20_000, depth=depth)
    begins = [start for start, _ in one.needles]
    assert begins == sorted(begins) and abs(one.depth - depth) < 0.02


@pytest.mark.parametrize('length, tok, often, seldom', [
    (2600, Bytes, 6, 1), (4096, Bytes, 6, 1), (9000, Bytes, 30, 3), (4095, Words, 6, 1),
    (4096, Words, 30, 3)])
def test_ten_words_are_most_common(length, tok, often, seldom):
  orders = []
  for index in range(3):
    one = draw('cwe', length, index, tok)
    context, _ = parts(one)
    shown, own = context.split('Below is a numbered list')[1:]
    listed = re.findall(r'(\d+)\. ([A-Za-z][\w -]*?)(?= \d+\. |$)', own)
    assert [int(i) for i, _ in listed] == [*range(1, len(listed) + 1)]
    counts = collections.Counter(word for _, word in listed[:-1])   # the last one may be cut
    ranked = counts.most_common()
    assert {word for word, _ in ranked[:10]} == {*one.references} and len(one.references) == 10
    assert {count for _, count in ranked[:9]} == {often} and ranked[9][1] >= often - 1
    assert ranked[10][1] == seldom and len(ranked) >= 20
    first = sorted(one.references, key=[word for _, word in listed].index)
    assert re.findall(r'\d+\. (\S.*?)(?= \d+\. |$)', one.target.decode()) == first
    assert first == [*one.references]
    example_list, answer = shown.split('Question:')
    shown_counts = collections.Counter(
        re.findall(r'\d+\. ([A-Za-z][\w -]*?)(?= \d+\. |\n|$)', example_list))
    assert {word for word, _ in shown_counts.most_common(10)} == {
        *re.findall(r'\d+\. (\S.*?)(?= \d+\. |\n)', answer)}
    assert not {*shown_counts} & {*counts}
    orders.append([i for i, (_, word) in enumerate(listed) if word in one.references])
  assert orders[0] != orders[1] != orders[2]   # positions are drawn anew


@pytest.fixture(scope='module')
def subwords(tmp_path_factory):
  """Two thousand pieces of Python's source, in which "100" and "probable" are fewer than other numbers and words."""
  path = tmp_path_factory.mktemp('subwords') / 'x.model'
  files = sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
  path.write_bytes(tokenizer.train_sentencepiece((file.read_bytes() for file in files), 2000, max_bytes=1_000_000))
  return tokenizer.load_tokenizer(str(path))


def often(one):
  return min(len(re.findall(rf'\. {word} \d', one.prompt.decode())) for word in one.references)


def test_no_list_of_common_words_is_refused_for_what_its_words_are(subwords, monkeypatch):
  made = lambda length: [draw.__wrapped__('cwe', length, index, lambda: subwords) for index in range(40)]
  assert {often(one) for one in made(4096)} == {6}
  border = int(ruler_words.long_needs(subwords)) + 1
  assert {often(one) for one in made(border - 1)} == {6} and min(map(often, made(border))) >= 29
  # Words of which the long form does not fit are drawn anew: of one list in eight at this border.
  lower = border * 19 // 20
  monkeypatch.setattr(ruler_words, 'long_needs', lambda tokenizer: lower)
  assert min(map(often, made(lower))) >= 29


def test_where_the_list_of_words_ends_pairs_are_taken():
  one = draw('cwe', 52_000, 0, Words)
  assert all(word in words.vocabulary() for word in draw('cwe', 30_000, 0, Words).references)
  assert all('-' in word for word in one.references)
  assert one.prompt.count(one.references[0].encode() + b' ') == 30


@pytest.mark.parametrize('length, tok', [
    (760, Bytes), (4096, Bytes), (20_000, Bytes), (4096, Words)])
def test_three_coded_words_are_most_frequent_after_the_dots(length, tok):
  orders = []
  for index in range(3):
    one = draw('fwe', length, index, tok)
    coded = parts(one)[0].split('most frequently appeared coded words. ')[1].split(' ')
    ranked = ranks(one)
    assert ranked[0][0] == '...' and [word for word, _ in ranked[1:4]] == [*one.references]
    assert one.target.decode().split(', ') == [f' {one.references[0]}', *one.references[1:]]
    counts = [count for _, count in ranked]
    assert counts[1] > counts[2] > counts[3] > (counts + [0])[4]
    total = sum(counts)
    assert 0.55 < counts[0] / total < 0.75   # 6/pi^2 and more where the others are rounded down
    assert all(re.fullmatch('[a-z]{6}', word) for word in one.references)
    orders.append([i for i, word in enumerate(coded) if word == one.references[0]])
  assert orders[0] != orders[1] != orders[2]


def test_what_an_essay_is_made_of_is_said(tmp_path):
  (tmp_path / 'one.txt').write_text(' '.join(f'It was {i} then.' for i in range(1000, 2000)))
  one = draw('niah_multivalue', haystack=str(tmp_path / '*.txt'))
  assert b' It was 1' in one.prompt and one.info['haystack'].endswith('*.txt')
  assert draw('niah_multivalue').info['haystack'] == 'synthetic'


def test_the_published_scores_have_the_published_means():
  names = [name.removeprefix('ruler_') for name in TASKS]
  assert len(names) == 13
  for model, mean in {'GPT-4-1106-preview at 4096': 96.6, 'Phi-3-mini-128k at 4096': 92.2,
                      'Phi-3-mini-128k at 8192': 91.5, 'Phi-3-mini-128k at 16384': 90.7}.items():
    scores = [TASKS[f'ruler_{name}'].published[model] for name in names]
    assert np.mean(scores) == pytest.approx(mean, abs=0.06)
    assert ruler_prompts.published('cwe')[model] == TASKS['ruler_cwe'].published[model]


def test_the_speeds_that_are_told_are_those_of_all_thirteen_in_bytes_and_in_subwords():
  folder = pathlib.Path(__file__).parent.parent / 'experiments' / '04_arena'
  found = json.loads((folder / 'results' / 'generators.json').read_text())
  slowest = {}
  for what, rows in (('bytes', found['rows']), ('pieces', found['subwords']['rows'])):
    for length in {row['length'] for row in rows}:
      speeds = {row['task']: row['per_second'] for row in rows if row['length'] == length}
      assert [*speeds] == [*TASKS]
      slowest[what, length] = f'{min(speeds.values()):,.0f}'
  told = re.search(r'comes to ([\d,]+) examples a second .* at 4,096 bytes \(([\d,]+) at 131,072\), and to (\d+) at 4,096\n'
                   r'tokens of a SentencePiece tokenizer of 8,000', (folder / 'README.md').read_text())
  assert found['subwords']['pieces'] == 8000 and int(told[3]) >= 50
  assert told.groups() == (slowest['bytes', 4096], slowest['bytes', 131_072], slowest['pieces', 4096])


def test_a_prompt_that_has_no_room_says_how_much_it_needs():
  for name in ('cwe', 'fwe', 'vt', 'niah_multikey_3', 'qa_2'):
    with pytest.raises(ConfigError, match=rf'ruler_{name}: length=300: must be at least') as caught:
      draw(name, 300)
    need = int(re.search(r'at least (\d+)', str(caught.value))[1])
    assert 300 < need < 3000
    draw(name, need + 200)
    if name == 'fwe':   # the shortest one has an answer, too
      (_, third), (_, fourth), *rest = ranks(draw(name, need))[2:]
      assert third > fourth > max([count for _, count in rest], default=0)


def test_the_key_that_is_asked_for_has_one_needle(monkeypatch):
  monkeypatch.setattr(words, 'keys', lambda: words.Pairs('abcdefg', 'abcdefghij'))   # 70 of them
  for index in range(4):
    one = draw.__wrapped__('niah_multikey_2', 8000, index)
    assert values_of(one)[0] == [*one.references]
