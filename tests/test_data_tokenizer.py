"""Tokenizers lose nothing, count bytes exactly, and never make a separator out of text."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import train_tokenizer
from longctx.data import corpus, stream, tokenizer
from longctx.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f'--config={ROOT}/tests/programs/mistaken.py'
TEXT = ('def encode(self, text):\n    return [self.ids[c] for c in text]  # über 32 größer\n\n'
        'class Tokenizer:\n\t"""The quick brown fox jumps over the lazy dog."""\n') * 40
NASTY = ['', ' ', '  a', 'a  ', '\n\n \n', '<s>', '</s>', '<unk>', '<0x41>', '\u2581',
         '\u2581\u2581 x', 'a\u2581b', '\0', 'ﬁ①Ａ', 'e\u0301 \u00e9', '\u2047\u2585', '\ufeff',
         '\U0001f600', '\r\n\t']


def train(**kwargs):
  import io

  import sentencepiece
  model = io.BytesIO()
  defaults = {'vocab_size': 400, 'model_type': 'bpe', 'byte_fallback': True, 'minloglevel': 2,
              'normalization_rule_name': 'identity'}
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **(defaults | kwargs))
  return model.getvalue()


@pytest.fixture(scope='module')
def model_path(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'small.model'
  path.write_bytes(tokenizer.train_sentencepiece([TEXT.encode()], 400))
  return str(path)


@pytest.fixture(scope='module')
def sentencepiece(model_path):
  return tokenizer.load_tokenizer(model_path)


def hold(tok, data):
  ids = tok.encode(data)
  assert tok.decode(ids) == data
  assert tok.num_bytes(ids).sum() == len(data)
  assert [len(tok.decode(ids[i:i + 1])) for i in range(len(ids))] == tok.num_bytes(ids).tolist()
  assert tok.separator not in ids
  assert all(0 <= i < tok.vocab_size for i in ids.tolist())


@given(st.binary(max_size=80))
def test_bytes_hold_any_bytes(data):
  tok = tokenizer.load_tokenizer('bytes')
  assert tok.encode(data).tolist() == list(data)
  hold(tok, data)


def test_bytes_contract():
  tok = tokenizer.load_tokenizer('bytes')
  assert (tok.vocab_size, tok.separator, tok.fingerprint) == (257, 256, 'bytes')
  assert tok.num_bytes(np.array([[256, 1], [2, 256]])).tolist() == [[0, 1], [1, 0]]
  assert tok.decode([256, 65, 256, 66]) == b'AB'


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_holds_any_text(sentencepiece, text):
  hold(sentencepiece, text.encode())


@given(st.lists(st.sampled_from([*NASTY, 'def', 'self', 'é', '1']), max_size=12))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_holds_nasty_text(sentencepiece, parts):
  hold(sentencepiece, ''.join(parts).encode())


def test_sentencepiece_learns_words_lines_and_indents(sentencepiece):
  assert sentencepiece.vocab_size == 400
  data = TEXT.encode()
  assert len(sentencepiece.encode(data)) < len(data) / 3
  pieces = [sentencepiece.decode([i]) for i in range(400)]
  assert b'    ' in pieces  # an indent is a token
  assert sum(p == bytes([b]) for b in range(256) for p in pieces) >= 256
  assert sentencepiece.num_bytes(np.array([sentencepiece.separator])).tolist() == [0]
  assert sentencepiece.decode([sentencepiece.separator]) == b''


def test_fingerprint_is_of_the_file(model_path, sentencepiece):
  import hashlib
  content = pathlib.Path(model_path).read_bytes()
  assert sentencepiece.fingerprint == hashlib.sha256(content).hexdigest()


def test_training_is_deterministic():
  a, b = (tokenizer.train_sentencepiece([TEXT.encode()], 400) for _ in range(2))
  assert a == b


def test_dummy_prefix_and_squeezed_spaces_of_foreign_models_are_undone(tmp_path):
  path = tmp_path / 'llama-like.model'
  path.write_bytes(train(add_dummy_prefix=True))
  for text in NASTY:
    hold(tokenizer.load_tokenizer(str(path)), text.encode())


@pytest.mark.parametrize('kwargs, message', [
    ({'normalization_rule_name': 'nmt_nfkc'}, 'changes the text'),
    ({'byte_fallback': False, 'vocab_size': 100}, 'no byte tokens'),
    ({'bos_id': -1, 'eos_id': -1}, 'neither a begin nor an end'),
])
def test_models_that_lose_text_are_refused(tmp_path, kwargs, message):
  path = tmp_path / 'lossy.model'
  path.write_bytes(train(**kwargs))
  with pytest.raises(ConfigError, match=rf"^data\.tokenizer='.*lossy\.model': .*{message}"):
    tokenizer.load_tokenizer(str(path))


def test_files_that_are_no_model(tmp_path):
  with pytest.raises(ConfigError, match=r"^data\.tokenizer='none\.model': .*no such file"):
    tokenizer.load_tokenizer('none.model')
  for content in (b'', b'not a model', b'\x0a\xff\xff'):
    (tmp_path / 'x.model').write_bytes(content)
    with pytest.raises(ConfigError, match='is not a SentencePiece model'):
      tokenizer.load_tokenizer(str(tmp_path / 'x.model'))


def test_stream_with_sentencepiece(tmp_path, model_path, sentencepiece):
  texts = [TEXT[:500], 'größe\n', TEXT[100:900]]
  for i, text in enumerate(texts):
    (tmp_path / f'{i}.txt').write_text(text)
  config = stream.Config(corpus='files', files=str(tmp_path / '*.txt'), tokenizer=model_path,
                         cache_dir=str(tmp_path / 'cache'), validation_fraction=0,
                         test_fraction=0, length=16, batch_size=2)
  documents = stream.open_documents(config, 'train')
  for i, text in enumerate(texts):
    ids = documents.document(i)
    assert ids[0] == sentencepiece.separator
    assert documents.tokenizer.decode(ids) == text.encode()
    np.testing.assert_array_equal(ids[1:], sentencepiece.encode(text.encode()))
    assert documents.tokenizer.num_bytes(ids).sum() == len(text.encode())
  assert documents.total_bytes == sum(len(t.encode()) for t in texts)
  state = stream.open_stream(config, seed=0).state()
  other = tmp_path / 'other.model'
  other.write_bytes(tokenizer.train_sentencepiece([TEXT.encode()], 401))
  with pytest.raises(ConfigError, match='tokenizer was'):
    stream.open_stream(stream.Config(**(config.__dict__ | {'tokenizer': str(other)})),
                       seed=0).restore(state)


def test_chunks_of_a_long_document_decode_to_it(tmp_path, model_path, monkeypatch):
  monkeypatch.setattr(corpus, 'CHUNK', 64)
  text = TEXT[:700] + 'ü' * 100
  (tmp_path / 'a.txt').write_text(text)
  config = stream.Config(corpus='files', files=str(tmp_path / '*.txt'), tokenizer=model_path,
                         cache_dir=str(tmp_path / 'cache'), validation_fraction=0, test_fraction=0)
  documents = stream.open_documents(config, 'train')
  assert documents.tokenizer.decode(documents.document(0)) == text.encode()


def test_documents_that_are_not_text_are_named(tmp_path, model_path):
  (tmp_path / 'a.txt').write_bytes(b'fine')
  (tmp_path / 'b.txt').write_bytes(b'abc\xff')
  config = stream.Config(corpus='files', files=str(tmp_path / '*.txt'), tokenizer=model_path,
                         cache_dir=str(tmp_path / 'cache'), validation_fraction=0, test_fraction=0)
  with pytest.raises(ConfigError, match=r"^b\.txt: byte 3 \(0xff\) is not UTF-8.*='bytes'"):
    stream.open_documents(config, 'train')


def command(*args, cwd=ROOT):
  return subprocess.run([sys.executable, '-m', 'longctx.train_tokenizer', *args], cwd=cwd,
                        capture_output=True, text=True, timeout=300)


def test_command_trains(tmp_path):
  (tmp_path / 'a.txt').write_text(TEXT)
  output = str(tmp_path / 'new' / 'a.model')
  done = command(f'--files={tmp_path}/*.txt', '--split=contiguous', '--vocab_size=380',
                 f'--output={output}')
  assert done.returncode == 0, done.stderr
  trained = tokenizer.load_tokenizer(output)
  assert trained.vocab_size == 380
  assert done.stdout == f'{output}: 380 tokens, sha256 {trained.fingerprint}\n'


@pytest.mark.parametrize('args, message', [
    (['--vocab_size=100', '--output=x.model'], '--vocab_size=100: must be at least 259'),
    (['--vocab_size=x', '--output=x.model'], '--vocab_size=x: must be a whole number'),
    (['--vocab_sise=300'], '--vocab_sise: unknown flag (did you mean "vocab_size"?)'),
    (['--output=x'], '--output=x: must be a path that ends in .model'),
    ([], '--output=: must be a path that ends in .model'),
    (['--text_feature=title', '--output=x.model'], "data.text_feature='title': is not read with "
     "data.corpus='stdlib'; set data.corpus='tfds'"),
    (['--tfds_name=a', '--tfds_splits=b,c', '--output=x.model'],
     "data.tfds_splits=('b', 'c'): must be empty or three names"),
    ([CONFIG, '--files=*.txt', '--output=x.model'],
     '--files: the corpus is that of --config; give --config.data.files=... instead'),
    ([CONFIG, '--config.data.lenght=3', '--output=x.model'], 'data.lenght: no such field'),
    (['--files=none*', '--output=x.model'], "data.files='none*': matches no file"),
    (['--corpus=stdlb', '--output=x.model'], '(did you mean "stdlib"?)'),
    (['x.txt', '--output=x.model'],
     "'x.txt': not a flag; quote a glob, or the shell opens it; see --help"),
])
def test_command_mistakes(capsys, args, message):
  assert train_tokenizer.main(['train_tokenizer', *args]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert message in err
  assert err.startswith('longctx: ')
  assert err.count('\n') == 1


def test_it_reads_what_the_config_trains_on_and_nothing_that_it_holds_out(tmp_path, capsys,
                                                                          monkeypatch):
  (tmp_path / 'a.txt').write_text('a' * 600 + 'b' * 300 + 'c' * 100)
  read = []
  def trained(texts, vocab_size, *, max_bytes):
    read.append((b''.join(texts), vocab_size))
    return tokenizer_bytes
  tokenizer_bytes = tokenizer.train_sentencepiece([TEXT.encode()], 380)
  monkeypatch.setattr(tokenizer, 'train_sentencepiece', trained)
  assert train_tokenizer.main([
      'train_tokenizer', CONFIG, '--config.data.corpus=files',
      f'--config.data.files={tmp_path}/*.txt', '--config.data.split=contiguous',
      '--config.data.validation_fraction=0.3', '--config.data.test_fraction=0.1',
      '--vocab_size=300', f'--output={tmp_path}/x.model']) == 0
  assert read == [(b'a' * 600, 300)]
  assert '380 tokens' in capsys.readouterr().out


def test_command_help(capsys):
  assert train_tokenizer.main(['train_tokenizer', '--help']) == 0
  said = capsys.readouterr().out
  assert all(f'--{name}=' in said for name in train_tokenizer.CORPUS)


@pytest.mark.parametrize('vocab_size, texts, message', [
    (260, [TEXT], r'^vocab_size=260: .*its characters and the bytes need at least \d+'),
    (100_000, [TEXT], r'^vocab_size=100000: .*set it to a value <= \d+'),
    (300, [], r'^vocab_size=300: .*there is none'),
])
def test_training_mistakes(vocab_size, texts, message):
  with pytest.raises(ConfigError, match=message) as e:
    tokenizer.train_sentencepiece([t.encode() for t in texts], vocab_size)
  assert '\n' not in str(e.value)
