"""RULER as published, byte for byte: hashes of what NVIDIA's generators wrote.

Made by running scripts/data/synthetic/*.py of github.com/NVIDIA/RULER at c3f5e3b with the arguments
of scripts/synthetic.yaml, in Python 3.11 with NumPy 2.4.6, SciPy 1.17.1 and wonderwords 3.0.1, with
the tokenizers defined here. Hashed are (input + answer_prefix, outputs) of all samples, as JSON.
"""

import functools
import hashlib
import itertools
import json
import re
import string

import pytest

from longctx.data.tasks import example, ruler_compat, scoring, words
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes, SentencePiece
from longctx.errors import ConfigError

# (tokenizer, --max_seq_length, --random_seed, --num_samples)
HASHES = {
    ('pieces', 2048, 42, 10): {
        'niah_single_1': 'd198c6bf7f2445e2', 'niah_multikey_2': '0cc5600140f310ae',
        'niah_multikey_3': 'd5f5bf56c147e35d', 'vt': '13f63b75fabdfe57', 'fwe': '8151304b41dc18eb'},
    ('pieces', 4096, 42, 10): {
        'niah_single_1': 'd1262226636dfb4d', 'niah_multikey_2': '524bfe0602c33370',
        'niah_multikey_3': 'b3b9a43f4f66a9ef', 'vt': '8351f51e4bfcb2f3', 'fwe': '1b9f99f8c3620b9a'},
    ('pieces', 4096, 7, 5): {
        'niah_single_1': 'bf67e17f79a86802', 'niah_multikey_2': '4bcf64c53b18277c',
        'niah_multikey_3': '608f4cae7c502e77', 'vt': '9a9532793bdfc107', 'fwe': '1b896508fe5dca48'},
    ('by hand', 8192, 42, 10): {
        'niah_single_1': '768aba17392c719a', 'niah_multikey_2': 'ac9eae5e3973cea2',
        'niah_multikey_3': 'a961e901623a212c', 'vt': '79ea731672b403b7', 'fwe': '39e417562b3cd8d8'},
}


class Pieces:
  """Runs of at most four letters or three digits, and every other character but spaces."""

  def encode(self, data):
    return re.findall(rb'[A-Za-z]{1,4}|[0-9]{1,3}|[^A-Za-z0-9 ]', data)


@functools.cache
def by_hand():
  """A SentencePiece model written down, not trained: the same on any machine."""
  import tempfile

  from sentencepiece import sentencepiece_model_pb2 as proto
  model, kind = proto.ModelProto(), proto.ModelProto.SentencePiece
  common = ['the', 'grass', 'is', 'green', 'sky', 'blue', 'sun', 'yellow', 'here', 'we', 'go',
            'there', 'and', 'back', 'again', 'one', 'of', 'special', 'magic', 'numbers', 'number',
            'for', 'text', 'VAR']
  pairs = {a + b for a in string.ascii_lowercase for b in string.ascii_lowercase} - {*common}
  letters = string.printable[:95].replace(' ', '\u2581')
  pieces = [('<unk>', 0, kind.UNKNOWN), ('<s>', 0, kind.CONTROL)]
  pieces += [(f'<0x{i:02X}>', 0, kind.BYTE) for i in range(256)]
  pieces += [(begin + word, -5, kind.NORMAL) for word in common for begin in ('', '\u2581')]
  pieces += [(pair, -8, kind.NORMAL) for pair in sorted(pairs)]
  pieces += [(letter, -10, kind.NORMAL) for letter in letters]
  for piece, score, which in pieces:
    model.pieces.add(piece=piece, score=score, type=which)
  spec, normalizer = model.trainer_spec, model.normalizer_spec
  spec.model_type, spec.byte_fallback = proto.TrainerSpec.UNIGRAM, True
  spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, -1, -1
  spec.vocab_size, normalizer.name = len(pieces), 'identity'
  normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
  with tempfile.NamedTemporaryFile(suffix='.model') as file:
    file.write(model.SerializeToString())
    file.flush()
    return SentencePiece(file.name)


TOKENIZERS = {'pieces': functools.cache(Pieces), 'by hand': by_hand}


def digest(samples):
  hashed = hashlib.sha256()
  for sample in samples:
    hashed.update(json.dumps([sample.prompt, list(sample.answers)]).encode())
  return hashed.hexdigest()[:16]


@pytest.mark.parametrize(('made', 'task'), [
    (made, task) for made, tasks in HASHES.items() for task in tasks])
def test_every_byte_is_the_reference_s(made, task):
  tok, length, seed, number = made
  encode = TOKENIZERS[tok]().encode
  samples = ruler_compat.samples(f'ruler_compat_{task}', lambda text: len(encode(text.encode())),
                                 length, seed=seed)
  assert digest(itertools.islice(samples, number)) == HASHES[made][task]


NAMES = sorted(name for name in TASKS if not TASKS[name].exact)


def draw(name, index, tok='pieces', length=4096, seed=42, **kwargs):
  return example.example(name, TASKS[name], TOKENIZERS[tok](), length=length, index=index,
                         seed=seed, **kwargs)


@pytest.mark.parametrize('name', NAMES)
def test_examples_are_the_samples_in_any_order(name):
  count = lambda text: len(Pieces().encode(text.encode()))
  samples = [*itertools.islice(ruler_compat.samples(name, count, 4096, seed=42), 4)]
  for index in (2, 0, 3, 3, 1):
    one = draw(name, index)
    assert one.prompt.decode() == samples[index].prompt
    assert one.references == samples[index].answers
    assert len(Pieces().encode(one.prompt)) + one.new_tokens <= 4096
    assert scoring.match_all(one.target.decode(), one) == 1
    assert scoring.match_all(one.without_context.decode(), one) == 0
    told = ' '.join(one.prompt[start:stop].decode() for start, stop in one.needles)
    assert all(ref in told for ref in one.references) or name == 'ruler_compat_fwe'
    assert all(start < stop <= one.question for start, stop in one.needles)


def test_where_the_published_loop_never_ends_an_error_says_so():
  with pytest.raises(ConfigError, match=r'example: length=500: .* never end: .* fewer than \d+ '):
    example.example('ruler_compat_vt', TASKS['ruler_compat_vt'], Bytes(), length=4096, index=0)
  with pytest.raises(ConfigError, match=r'ruler_compat_niah_multikey_3: length=400: .* never end'):
    draw('ruler_compat_niah_multikey_3', 0, length=400)
  with pytest.raises(ConfigError, match='ruler_compat_fwe: length=100: must be more than'):
    draw('ruler_compat_fwe', 0, length=100)


def test_what_the_published_form_has_not_is_refused():
  with pytest.raises(ConfigError, match=r'depth=0.5: .* ruler_vt takes any'):
    draw('ruler_compat_vt', 0, depth=0.5)
  assert not any(task.placed for name, task in TASKS.items() if 'compat' in name)   # so that none is asked for
  with pytest.raises(ConfigError, match='must be a number'):
    draw('ruler_compat_vt', 0, seed=('train', 1))


def test_two_names_alike_fail_as_in_the_reference():
  """Seed 35 is the first whose search meets this; there the reference stops with an IndexError."""
  count = lambda text: len(Pieces().encode(text.encode()))
  next(ruler_compat.samples('ruler_compat_vt', count, 1200, seed=34))
  with pytest.raises(ruler_compat.FailedSampleError, match='two of its names are the same'):
    next(ruler_compat.samples('ruler_compat_vt', count, 1200, seed=35))


def test_keys_are_in_the_order_of_all_of_them():
  firsts = ['blue', 'blue-eyed', 'blu', 'bluer', 'a b', 'a', 'A', 'blue']
  seconds = ['eyed', 'cat', '-', 'x-ray', 'eyed-cat', 'Z', 'cat']
  pairs = words.Pairs(firsts, seconds)
  wanted = sorted({f'{first}-{second}' for first in firsts for second in seconds})
  assert [*pairs] == wanted and len(pairs) == len(wanted)
  assert len(words.keys()) == 910 * 6782 and len(words.vocabulary()) == 8166
