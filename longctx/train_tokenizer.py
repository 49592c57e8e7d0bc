"""python -m longctx.train_tokenizer --config=configs/books.py --output=books.model
python -m longctx.train_tokenizer --files='books/**/*.txt' --output=books.model

Trains a SentencePiece tokenizer on the train split of a corpus: a config's, and so on nothing that
its model is tested on, or the one that the flags name. It loses nothing: no normalisation, and bytes
for characters that it does not know. Give its file as data.tokenizer; its hash goes into caches and
checkpoints.
"""

# Held by: tests/test_data_tokenizer.py.

import pathlib
import sys
from typing import Any

from absl import flags

from longctx import command_line
from longctx.errors import ConfigError, check, check_range


def define_flags() -> flags.FlagValues:
  """The flags of this face but for --config, in a table of their own."""
  table = flags.FlagValues()
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  real = lambda *args: flags.DEFINE_float(*args, flag_values=table)
  whole = lambda *args: flags.DEFINE_integer(*args, flag_values=table)
  # What stands in for a config's section `data`.
  text('corpus', '', "Without --config: 'stdlib', 'files' or 'tfds'; '' is what the others mean.")
  text('files', '', 'A glob of text files.')
  text('tfds_name', '', 'A name of TensorFlow Datasets.')
  text('tfds_dir', '', 'The folder of TensorFlow Datasets.')
  text('tfds_splits', '', 'Three, with commas between, such as train[:90%],train[90%:],test.')
  text('text_feature', 'text', 'The feature of an example that holds the text.')
  text('split', 'hash', "How the corpus is split: 'hash' or 'contiguous'.")
  real('validation_fraction', 0.05, 'Held out.')
  real('test_fraction', 0.05, 'Held out.')
  whole('vocab_size', 8000, 'Tokens, 256 of them bytes.')
  whole('max_bytes', 100_000_000, 'Text to train on at most.')
  text('output', '', 'The .model file to write.')
  flags.DEFINE_bool('help', False, 'Show this help.', flag_values=table)
  return table


CORPUS = ('corpus', 'files', 'tfds_name', 'tfds_dir', 'tfds_splits', 'text_feature', 'split',
          'validation_fraction', 'test_fraction')


def data_config(f: flags.FlagValues, config: Any) -> Any:
  """The stream.Config that says what text there is, and which of it is held out."""
  if config is not None:
    from longctx import configuration
    given = [name for name in CORPUS if f[name].present]
    check(not given, f'--{"".join(given[:1])}: the corpus is that of --config; give '
          f'--config.data.{"".join(given[:1])}=... instead')
    return configuration.parts(config).data
  from longctx.data import stream
  named = 'files' if f.files else 'tfds' if f.tfds_name else 'stdlib'
  values = {name: f[name].value for name in CORPUS}
  splits = tuple(name.strip() for name in f.tfds_splits.split(',') if name.strip())
  return stream.Config(**(values | dict(corpus=f.corpus or named, tfds_splits=splits)))


def run(f: flags.FlagValues, config: Any) -> None:
  """Trains and writes; says what came of it."""
  check(f.output.endswith('.model'), f'--output={f.output}: must be a path that ends in .model')
  check_range('--vocab_size', f.vocab_size, 259)
  check_range('--max_bytes', f.max_bytes, 1)
  data = data_config(f, config)
  from longctx.data import corpus, tokenizer
  source = corpus.open_source(data)
  texts = (chunk for _, chunks in source.documents('train') for chunk in chunks)
  model = tokenizer.train_sentencepiece(texts, f.vocab_size, max_bytes=f.max_bytes)
  path = pathlib.Path(f.output).expanduser()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
  except OSError as e:
    raise ConfigError(f'--output={f.output}: cannot be written: {e.strerror}') from e
  trained = tokenizer.load_tokenizer(str(path))
  print(f'{f.output}: {trained.vocab_size} tokens, sha256 {trained.fingerprint}')


def main(argv: list[str]) -> int:
  try:
    if command_line.HELP & set(argv[1:]):
      print(command_line.help_text(__doc__, define_flags()))
      return 0
    run(*command_line.parse_with_config(define_flags, argv,
                                        stray='quote a glob, or the shell opens it'))
  except ConfigError as e:
    return command_line.complain(e)
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
