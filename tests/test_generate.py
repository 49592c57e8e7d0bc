"""The command that continues a prompt: what it writes, and each mistake in one line."""

import io
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly, generate
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.models import encoder, encoder_config, encoder_decoder
from tests import toy_models

SEP = 256


class Loader:
  """In place of assembly.load_for_inference: the count model over bytes."""

  def __init__(self):
    self.model = toy_models.CountModel(257, max_length=100)
    self.calls = []

  def __call__(self, folder, *, use_ema=False, checkpoint='newest', seq=1):
    self.calls.append((folder, use_ema, checkpoint))
    return *nnx.split(self.model), Bytes(), self.model.config, None


@pytest.fixture
def loader(monkeypatch):
  loader = Loader()
  monkeypatch.setattr(assembly, 'load_for_inference', loader)
  monkeypatch.setattr(generate, 'set_compilation_cache', lambda folder: None)
  return loader


def run(tmp_path, *args):
  return generate.main(['generate', f'--workdir={tmp_path}', *args])


def test_the_text_goes_on_from_the_prompt(tmp_path, loader, capsys):
  assert run(tmp_path, '--prompt=abb', '--max_new_tokens=4', '--temperature=0') == 0
  assert capsys.readouterr().out == 'abbbbbb\n'
  assert run(tmp_path, '--prompt=abb', '--max_new_tokens=4', '--temperature=0', '--noecho') == 0
  assert capsys.readouterr().out == 'bbbb\n'
  assert loader.calls == [(str(tmp_path), False, 'newest')] * 2
  run(tmp_path, '--prompt=abb', '--max_new_tokens=1', '--use_ema', '--checkpoint=best')
  assert loader.calls[-1] == (str(tmp_path), True, 'best')


def test_symbols_that_the_tokenizer_does_not_have_are_never_chosen(tmp_path, loader, capsys):
  """A model with room for 300 symbols, that likes those above the tokenizer's 257 best."""
  class Model(toy_models.CountModel):
    def logits(self, hidden_BTD):
      return super().logits(hidden_BTD) + 9.0 * (jnp.arange(300) > 256)
  loader.model = Model(300, max_length=100)
  assert run(tmp_path, '--prompt=abb', '--max_new_tokens=4', '--temperature=0') == 0
  assert capsys.readouterr().out == 'abbbbbb\n'


def test_the_seed_decides_the_text(tmp_path, loader, capsys):
  texts = []
  for seed in (1, 1, 2):
    run(tmp_path, '--prompt=abcdefgh', '--max_new_tokens=30', f'--seed={seed}', '--top_k=8')
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1] != texts[2]
  assert len(texts[0]) > 10
  assert set(texts[0].strip()) <= set('abcdefgh')


def test_an_empty_prompt_starts_a_document_and_the_separator_ends_it(tmp_path, loader, capsys):
  """After the separator alone the count model expects another one: the text is empty."""
  assert run(tmp_path, '--temperature=0', '--max_new_tokens=5') == 0
  assert capsys.readouterr().out == ''


def test_prompt_files_and_stdin_keep_every_byte(tmp_path, loader, capsys, monkeypatch):
  file = tmp_path / 'prompt'
  file.write_bytes(b'\xe9\xe9\xe9')  # Latin-1; a byte tokenizer takes it
  assert run(tmp_path, f'--prompt_file={file}', '--max_new_tokens=2', '--temperature=0') == 0
  assert capsys.readouterr().out == '\ufffd' * 5 + '\n'
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('né'.encode() * 2)))
  assert run(tmp_path, '--prompt=-', '--max_new_tokens=1', '--temperature=0') == 0
  assert capsys.readouterr().out == 'néné' + 'n\n'


def test_characters_are_written_when_they_are_whole():
  text = 'aé€𝄞z'
  written = []
  generate.write_text(b'>', iter(text.encode()), lambda ids: bytes(ids), written.append)
  assert ''.join(written) == '>' + text
  assert [w for w in written if w] == ['>', *text]
  written.clear()
  generate.write_text(b'\xe2\x82', iter(b'\xacA\xffB\xe2'), lambda ids: bytes(ids), written.append)
  assert ''.join(written) == '€A\ufffdB\ufffd'  # begun in the prompt; and broken at the end


def test_a_terminal_gets_no_control_characters(monkeypatch):
  class Screen(io.StringIO):
    def isatty(self):
      return True
  monkeypatch.setattr(sys, 'stdout', Screen())
  generate.Terminal(echo=True)('a\x1b[2Jb\r\n\tc\x9bd')
  assert sys.stdout.getvalue() == 'a\ufffd[2Jb\r\n\tc\ufffdd'


MISTAKES = [
    ([], '--workdir: missing'),
    (['--workdir=/no/such/folder'], '--workdir=/no/such/folder: no such folder'),
    (['--promt=a'], 'did you mean "prompt"'),
    (['--tempreture=1'], 'did you mean "temperature"'),
    (['hello'], "'hello': not a flag"),
    (['--top_k=many'], '--top_k=many'),
    (['W', '--temperature=-1'], '--temperature=-1.0: must be at least 0'),
    (['W', '--temperature=nan'], '--temperature=nan'),
    (['W', '--top_p=0'], '--top_p=0.0: must be above 0 and at most 1'),
    (['W', '--top_p=1.5'], '--top_p=1.5'),
    (['W', '--top_k=-1'], '--top_k=-1: must be at least 0'),
    (['W', '--min_p=1'], '--min_p=1.0: must be at least 0 and below 1'),
    (['W', '--checkpoint=bset'], '--checkpoint=bset: must be newest, best or a step, such as 1000 '
     '(did you mean "best"?)'),
    (['W', '--checkpoint=-1'], '--checkpoint=-1: must be newest, best or a step'),
    (['W', '--max_new_tokens=0'], '--max_new_tokens=0: must be at least 1'),
    (['W', '--seed=-1'], '--seed=-1'),
    (['W', '--prompt=a', '--prompt_file=b'], 'not both'),
    (['W', '--prompt_file=/no/such/file'], 'cannot be read: No such file'),
    (['W', '--prompt_file=/'], 'cannot be read: Is a directory'),
    (['W', '--prompt=caf\udce9'], 'byte 3 (0xe9) is not UTF-8; to continue text in another '
     'encoding give --prompt_file'),
    (['W', '--prompt=abc', '--max_new_tokens=97'],
     '--max_new_tokens=97: with the 4 tokens of the prompt (its separator counted) that is 101; '
     'must be at most model.max_length=100'),
]


@pytest.mark.parametrize('args, message', MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(tmp_path, loader, capsys, args, message):
  args = [f'--workdir={tmp_path}' if a == 'W' else a for a in args]
  assert generate.main(['generate', *args]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('longctx: ')
  assert err.count('\n') == 1
  assert message in err


def test_the_longest_allowed_request_is_served(tmp_path, loader, capsys):
  assert run(tmp_path, '--prompt=abc', '--max_new_tokens=96', '--temperature=0') == 0
  assert len(capsys.readouterr().out) == 3 + 96 + 1


def test_parameters_that_are_not_finite_are_named(tmp_path, loader, capsys):
  loader.model.eye.set_value(jnp.full((257, 257), np.nan))
  assert run(tmp_path, '--prompt=abc', '--max_new_tokens=9') == 2
  out, err = capsys.readouterr()
  assert 'the logits of new token 1 hold NaN' in err
  assert out == 'abc\n'


def test_help_is_quick_and_names_every_flag():
  start = time.monotonic()
  done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'longctx.generate', '--help'],
                        capture_output=True, text=True, timeout=60, check=True)
  assert time.monotonic() - start < 30  # under any load; what makes it quick is the next line
  assert not any(line.split('|')[-1].strip() in ('jax', 'flax', 'orbax', 'numpy')
                 for line in done.stderr.splitlines())
  for name in ('workdir', 'prompt', 'prompt_file', 'max_new_tokens', 'temperature', 'top_k',
               'top_p', 'min_p', 'seed', 'use_ema', 'checkpoint'):
    assert f'--{name}=' in done.stdout


# --- From a source.


def pair_model():
  config = encoder_config.PairConfig(
      vocab_size=257, num_layers=1, embed_dim=16, num_heads=2, max_length=16, source_length=8,
      init_std=0.5, layer_loop='unrolled', position='sinusoidal')
  return encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(3))


def test_what_follows_from_a_source_is_the_likeliest_of_the_whole_model(tmp_path, loader, capsys):
  """Greedy, by whole calls without a state; and another source gives another text."""
  loader.model, texts = pair_model(), []
  call = jax.jit(lambda target, source: loader.model.logits(loader.model(
      target, None, source_BS=source)[0]))
  for source in (b'ab', b'xyz'):
    target = [SEP, *b'Z']
    source_ids = jnp.asarray([[*source, SEP]])
    while len(target) < 8:
      padded = jnp.asarray([target + [0] * (8 - len(target))])
      token = int(call(padded, source_ids)[0, len(target) - 1].argmax())
      if token == SEP:
        break
      target.append(token)
    assert run(tmp_path, f'--source={source.decode()}', '--prompt=Z', '--max_new_tokens=6',
               '--temperature=0') == 0
    texts.append(capsys.readouterr().out)
    assert texts[-1].rstrip('\n') == bytes(target[1:]).decode('utf-8', 'replace').rstrip('\n')
  assert texts[0] != texts[1]


@pytest.mark.parametrize('args,message', [
    ((), "--source: missing; model.name='encoder_decoder' writes what follows from a source"),
    (('--source=abcdefgh',), '--source: has 9 tokens (its separator counted); must be at most '
     'model.source_length=8'),
    (('--source=a', '--source_file=b'), '--source, --source_file: give one of them, not both'),
    (('--source=-', '--prompt=-'), '--prompt=- --source=-: stdin can be one of them'),
    (('--source_file=/no/such',), '--source_file=/no/such: cannot be read: No such file')])
def test_mistakes_with_a_source_are_one_line(tmp_path, loader, capsys, args, message):
  loader.model = pair_model()
  assert run(tmp_path, '--max_new_tokens=4', *args) == 2
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


def test_a_source_is_refused_by_a_language_model_and_an_encoder_writes_nothing(
    tmp_path, loader, capsys):
  assert run(tmp_path, '--source=a') == 2
  assert "--source: model.name='toy' reads a text and carries it on" in capsys.readouterr().err
  loader.model = encoder.Encoder(encoder_config.Config(vocab_size=258, num_layers=1, embed_dim=8,
                                                       num_heads=1), rngs=nnx.Rngs(0))
  assert run(tmp_path, '--prompt=a') == 2
  assert 'writes no text' in capsys.readouterr().err


def test_an_encoder_decoder_keeps_no_conversation():
  assembly.check_writes(pair_model().config)
  with pytest.raises(ConfigError, match='--source=TEXT'):
    assembly.check_writes(pair_model().config, alone=True)
