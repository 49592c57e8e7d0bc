"""Trains a SentencePiece tokenizer on the train split of a corpus.

    python -m longctx.data.train_tokenizer --files='books/**/*.txt' --output=books.model

It loses nothing: no normalisation, and bytes for characters that it does not know. Give its file as
data.tokenizer; its hash goes into caches and checkpoints.
Held by: tests/test_data_tokenizer.py.
"""

import pathlib
import sys

from absl import app, flags

from longctx.data import corpus, stream, tokenizer
from longctx.errors import ConfigError, check, check_range

FLAGS = flags.FLAGS
flags.DEFINE_string('corpus', '', "'stdlib', 'files' or 'tfds'; '' is what the other flags mean")
flags.DEFINE_string('files', '', 'A glob of text files')
flags.DEFINE_string('tfds_name', '', 'A name of TensorFlow Datasets')
flags.DEFINE_string('tfds_dir', '', 'The folder of TensorFlow Datasets')
flags.DEFINE_string('split', 'hash', "How the corpus is split: 'hash' or 'contiguous'")
flags.DEFINE_float('validation_fraction', 0.05, 'Held out')
flags.DEFINE_float('test_fraction', 0.05, 'Held out')
flags.DEFINE_integer('vocab_size', 8000, 'Tokens, 256 of them bytes')
flags.DEFINE_integer('max_bytes', 100_000_000, 'Text to train on at most')
flags.DEFINE_string('output', '', 'The .model file to write')


def train(config: stream.Config, *, vocab_size: int, max_bytes: int, output: str) -> None:
  check(output.endswith('.model'), f'output={output!r}: must be a path that ends in .model')
  check_range('vocab_size', vocab_size, 259)
  check_range('max_bytes', max_bytes, 1)
  source = corpus.open_source(config)
  texts = (chunk for _, chunks in source.documents('train') for chunk in chunks)
  model = tokenizer.train_sentencepiece(texts, vocab_size, max_bytes=max_bytes)
  path = pathlib.Path(output).expanduser()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
  except OSError as e:
    raise ConfigError(f'output={output!r}: cannot be written: {e.strerror}') from e


def main(argv: list[str]) -> None:
  try:
    check(len(argv) == 1,
          f'{" ".join(argv[1:])!r}: is not a flag; quote a glob, or the shell opens it')
    named = 'files' if FLAGS.files else 'tfds' if FLAGS.tfds_name else 'stdlib'
    config = stream.Config(
        corpus=FLAGS.corpus or named, files=FLAGS.files, tfds_name=FLAGS.tfds_name,
        tfds_dir=FLAGS.tfds_dir, split=FLAGS.split, validation_fraction=FLAGS.validation_fraction,
        test_fraction=FLAGS.test_fraction)
    train(config, vocab_size=FLAGS.vocab_size, max_bytes=FLAGS.max_bytes, output=FLAGS.output)
    trained = tokenizer.load_tokenizer(FLAGS.output)
  except ConfigError as e:
    sys.exit(f'error: {e}')
  print(f'{FLAGS.output}: {trained.vocab_size} tokens, sha256 {trained.fingerprint}')


if __name__ == '__main__':
  app.run(main)
