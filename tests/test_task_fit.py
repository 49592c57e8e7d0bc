"""Cuts that give exactly so many tokens, and texts to hide needles in, of any script."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.tasks import example, fit, haystack
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from tests.test_tasks import OTHER_SCRIPTS, PROSE, small_sentencepiece

TEXTS = {'prose': PROSE, **OTHER_SCRIPTS}


def draw(length, tokenizer=None, **kwargs):
  return example.Draw(rng=np.random.default_rng(0), tokenizer=tokenizer or Bytes(), length=length,
                      index=0,
                      **kwargs)


@pytest.mark.parametrize('script', TEXTS)
@pytest.mark.parametrize('tokenizer', [Bytes, small_sentencepiece])
def test_every_length_is_met_exactly_and_no_character_is_cut(tokenizer, script):
  tok, text = tokenizer(), (TEXTS[script] * 8).encode()
  build = lambda part: 'Зачем? '.encode() + part + b'\nWhat?'
  for length in range(60, 100):
    prompt, filler = fit.filled(draw(length, tok), build, text, 5, 'x')
    assert prompt == build(filler)
    assert len(tok.encode(prompt)) == length - 1 - 5
    kept = filler.decode()   # UTF-8
    begun = next(i for i in range(len(kept), -1, -1)
                 if TEXTS[script] * 8 == kept[:i] + (TEXTS[script] * 8)[i:])
    assert set(kept[begun:]) <= set(' .the')   # what may end it


class Pairs:
  """A tokenizer whose every token is two bytes; an odd byte is one too. Four full stops are one."""

  vocab_size = 10

  def encode(self, data):
    data = data.replace(b'....', b'..')
    return np.zeros(-(-len(data) // 2), np.int32)

  def num_bytes(self, ids):
    return np.full(np.shape(ids), 2)


def test_least_and_no_fit_are_told():
  with pytest.raises(ConfigError,
                     match=r'^x: length=9: must be at least 13 in .*tokens \(2 of them'):
    fit.filled(draw(9), lambda part: b'0123456789' + part, b'abc', 2, 'x')
  assert fit.filled(draw(13), lambda part: b'0123456789' + part, b'abc', 2, 'x') == (b'0123456789',
                                                                                     b'')
  with pytest.raises(AssertionError, match='3 bytes of filler are too few for 30 tokens'):
    fit.filled(draw(30), lambda part: b'0123456789' + part, b'abc', 2, 'x')
  # A prompt that grows by three tokens at a time can have no other number of them.
  threes = lambda part: b'abc' * (len(part) + 1)
  assert len(fit.filled(draw(3 * 7 + 1), threes, b'z' * 99, 0, 'x')[0]) == 21
  with pytest.raises(ConfigError, match=r'length=23: no cut of the text .*; try 24'):
    fit.filled(draw(23), threes, b'z' * 99, 0, 'x')


def test_tokens_of_two_bytes_are_met():
  for length in range(8, 40):
    prompt, _ = fit.filled(draw(length, Pairs()), lambda part: b'abc' + part, b'z' * 99, 1, 'x')
    assert len(Pairs().encode(prompt)) == length - 2


def test_few_whole_prompts_are_counted_and_the_cut_is_that_of_counting_all(monkeypatch):
  tok, text = small_sentencepiece(), haystack.noise(np.random.default_rng(1), 16_000)
  build = lambda part: b'Begin. ' + part + b'\nWhat?'
  whole = []

  class Counted:
    vocab_size, num_bytes = tok.vocab_size, tok.num_bytes

    def encode(self, data):
      whole[-1] += data.endswith(b'What?') and data.startswith(b'Begin. ')
      return tok.encode(data)

  def cut(length):
    whole.append(0)
    return fit.filled(draw(length, Counted()), build, text, 5, 'x')[0]

  few = [cut(length) for length in range(723, 729)]
  assert max(whole) <= 8   # of twenty nearby
  monkeypatch.setattr(fit, 'told', lambda *args: 10**9)   # none is likely, none short enough: all are counted
  monkeypatch.setattr(fit, 'STOPS', 0)   # and no ending is tried before
  assert [cut(length) for length in range(723, 729)] == few and max(whole) >= 16


def test_bytes_for_is_by_the_longest_token_within_reason():
  assert fit.bytes_for(draw(100)) == 100 + fit.NEAR
  assert fit.bytes_for(draw(100, Pairs())) == 200 + fit.NEAR
  assert fit.bytes_for(draw(100, small_sentencepiece())) == 800 + fit.NEAR


@given(st.text('aé。 \n\U0001f600', max_size=30), st.integers(0, 60))
@settings(deadline=None, max_examples=50)
def test_between_is_the_last_character_that_is_whole(text, cut):
  data = text.encode()
  cut = min(cut, len(data))
  at = fit.between(data, cut)
  assert data[:at].decode() == data[:cut].decode('utf-8', 'ignore')


def test_needles_stand_between_sentences_of_any_script():
  for text, parts in (
      ('One. Two!  Three? "Four." Five (six.) Seven',
       ['One. ', 'Two!  ', 'Three? ', '"Four." ', 'Five (six.) ', 'Seven']),
      ('3.14 is e.g. no end', ['3.14 is e.g. ', 'no end']),
      ('天。地！「人。」山', ['天。', '地！', '「人。」', '山']),
      ('राम आया। गया।', ['राम आया। ', 'गया।']), ('هل جاء؟ نعم', ['هل جاء؟ ', 'نعم']),
      ('Ja… «Nein.» Doch', ['Ja… ', '«Nein.» ', 'Doch']), ('', [''])):
    starts = haystack.sentence_starts(text.encode())
    cuts = [*starts.tolist(), len(text.encode())]
    assert [text.encode()[a:b].decode() for a, b in itertools.pairwise(cuts) if a < b
            or not text] == parts


def test_a_long_stretch_without_sentences_is_cut_between_words():
  text = b'Begin. ' + b'word ' * 1000 + b'end. Last'
  starts = haystack.sentence_starts(text)
  assert {0, 7, len(text) - 4} <= set(starts.tolist())
  assert np.diff(starts).min() > 0 and np.diff(starts).max() <= haystack.STRETCH
  assert all(text[start - 1:start] == b' ' for start in starts[1:])
  assert haystack.near(starts, 8.6) == 7 and haystack.near(starts, -1) == 0
  assert haystack.near(starts, 1e9) == starts[-1]


def test_real_text_goes_round_from_a_sentence_on(tmp_path):
  (tmp_path / 'b.txt').write_text('Drei\n\n äh.  Vier!')
  (tmp_path / 'a.txt').write_text('Eins. Zwei?\n')
  whole = 'Eins. Zwei? Drei äh. Vier! '   # by name, white space as one space
  seen = set()
  for seed in range(24):
    for size in (*range(1, 40), 100):
      text = haystack.real(f'{tmp_path}/*.txt', np.random.default_rng(seed), size).decode()
      assert size <= len(text.encode()) <= size + 3
      assert text in whole * 10
      seen.add(text[:2])
  assert seen == {'Ei', 'Zw', 'Dr', 'Vi'}


def test_haystacks_by_name():
  assert haystack.of(draw(1))(50) == haystack.of(draw(1, haystack='repeated'),
                                                 len)(50) == haystack.GRASS[:50]
  assert haystack.of(draw(1), lambda size: b'own')(50) == b'own'
  one, two = (haystack.of(draw(1, haystack='noise'))(size).decode() for size in (10, 5000))
  assert len(one) >= 10 and len(two) >= 5000
  for text in (one, two):
    sentences = text.split('. ')
    assert sentences.pop() == ''
    assert all(3 < len(words) < 13 and set(words) <= set(haystack.WORDS) and s[0].isupper()
               for s in sentences[:-1] for words in [s.lower().split()])
  assert len(set(two.lower().replace('.', '').split())) > 0.9 * len(haystack.WORDS)


@pytest.mark.parametrize('content, message', [
    (b' \n ', 'the files hold no text'), (b'ab\xffc', 'must be UTF-8; byte 2 is not'),
    (b'a' * 5000, '5001 bytes without the end of a sentence or a word')])
def test_files_that_are_no_haystack(tmp_path, content, message):
  (tmp_path / 'x.txt').write_bytes(content)
  with pytest.raises(ConfigError, match=rf"^eval\.haystack='.*x\.txt': .*{message}"):
    haystack.of(draw(1, haystack=f'{tmp_path}/x.txt'))(10)
  with pytest.raises(ConfigError, match=r"^eval\.haystack='noises': no file matches"):
    haystack.of(draw(1, haystack='noises'))(10)
