"""What a run writes and prints: lines that are JSON whatever happens, and numbers that are true."""

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.errors import ConfigError
from longctx.training import metrics
from longctx.training.metrics import MetricsWriter, Progress


def read(folder):
  def never(name):
    raise ValueError(f'{name} is not JSON')
  return [json.loads(line, parse_constant=never)
          for line in (folder / 'metrics.jsonl').read_text().splitlines()]


# The file.


def test_a_line_is_one_json_object_with_the_known_fields_first(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(10, {'skipped_steps': 0, 'seconds': 1.5, 'loss': np.float32(0.5),
                    'grad_norm': jnp.float32(2), 'learning_rate': 1e-3, 'bits_per_byte': 0.75})
  assert (tmp_path / 'metrics.jsonl').read_bytes().endswith(b'\n')  # there before close
  writer.write(20, {'validation_loss': 0.25, 'note': 'best'})
  writer.close()
  one, two = read(tmp_path)
  assert list(one) == ['step', 'loss', 'bits_per_byte', 'grad_norm', 'learning_rate', 'seconds',
                       'skipped_steps']
  assert one == {'step': 10, 'loss': 0.5, 'bits_per_byte': 0.75, 'grad_norm': 2.0,
                 'learning_rate': 1e-3, 'seconds': 1.5, 'skipped_steps': 0}
  assert two == {'step': 20, 'validation_loss': 0.25, 'note': 'best'}


def test_what_is_not_finite_becomes_null(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {'loss': math.nan, 'grad_norm': np.float32('inf'), 'x': jnp.array(-jnp.inf)})
  writer.close()
  assert read(tmp_path) == [{'step': 1, 'loss': None, 'grad_norm': None, 'x': None}]


def test_a_resumed_run_drops_later_and_torn_lines_and_appends(tmp_path):
  writer = MetricsWriter(tmp_path)
  for step in (10, 20, 20, 30):
    writer.write(step, {'loss': float(step)})
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  with open(path, 'ab') as f:
    f.write(b'{"step": 15, "lo')
  writer = MetricsWriter(tmp_path)
  writer.truncate_after(20)
  assert [line['step'] for line in read(tmp_path)] == [10, 20, 20]
  writer.write(30, {'loss': 3.0})
  writer.close()
  assert [line['loss'] for line in read(tmp_path)] == [10, 20, 20, 3]
  assert sorted(os.listdir(tmp_path)) == ['metrics.jsonl', 'tensorboard']


@pytest.mark.parametrize('torn', [b'', b'{"step": 5', b'[1]\n', b'{"loss": 1}\n', b'null\n',
                                  b'\xff\xfe\n', b'{"step": 5, "loss": 1}'])
def test_torn_ends_of_every_kind_leave_the_whole_lines(tmp_path, torn):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 4}\n' + torn)
  MetricsWriter(tmp_path).truncate_after(9)
  whole = [4, 5] if torn.endswith(b'1}') else [4]  # a whole object that lacks only its newline
  assert [line['step'] for line in read(tmp_path)] == whole
  assert path.read_bytes().endswith(b'\n')


def test_a_fresh_run_has_nothing_to_truncate(tmp_path):
  MetricsWriter(tmp_path).truncate_after(0)
  assert os.listdir(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 4}\n')
  writer = MetricsWriter(tmp_path, enabled=False)
  writer.truncate_after(0)
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert os.listdir(tmp_path) == ['metrics.jsonl']
  assert read(tmp_path) == [{'step': 4}]


class FullDisk(io.FileIO):
  """Takes five bytes and then says that there is no more room."""

  full = True

  def write(self, data):
    return super().write(data[:5]) if FullDisk.full else super().write(data)


def test_a_full_disk_costs_no_line_and_not_the_run(tmp_path, monkeypatch, capsys):
  opened = lambda path, mode, buffering: FullDisk(path, mode.replace('b', ''))
  monkeypatch.setattr(metrics, 'open', opened, raising=False)
  monkeypatch.setattr(FullDisk, 'full', False)
  writer = MetricsWriter(tmp_path)
  writer.write(1, {'loss': 1.0})
  monkeypatch.setattr(FullDisk, 'full', True)
  writer.write(2, {'loss': 2.0})
  assert [line['step'] for line in read(tmp_path)] == [1]
  assert 'metrics.jsonl: lines wait for room: No space left on device' in capsys.readouterr().err
  monkeypatch.setattr(FullDisk, 'full', False)
  writer.write(3, {'loss': 3.0})
  writer.close()
  assert [line['step'] for line in read(tmp_path)] == [1, 2, 3]


def test_a_full_disk_does_not_keep_a_run_from_resuming(tmp_path, monkeypatch):
  writer = MetricsWriter(tmp_path)
  for step in (1, 2, 3):
    writer.write(step, {'loss': 1.0})
  def full(path, data):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(metrics, 'atomic_write', full)
  MetricsWriter(tmp_path).truncate_after(2)
  assert [line['step'] for line in read(tmp_path)] == [1, 2]
  # A torn line in the middle: the file must be written anew.
  text = (tmp_path / 'metrics.jsonl').read_bytes()
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"st\n' + text)
  with pytest.raises(ConfigError, match=r'metrics\.jsonl: cannot drop the lines after step 2 \(No '
                     'space left on device\\); make room'):
    MetricsWriter(tmp_path).truncate_after(2)


@pytest.mark.parametrize('code', [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_file_that_may_not_be_written_costs_no_line_either(tmp_path, monkeypatch, capsys, code):
  writer = MetricsWriter(tmp_path)
  def refuse(*args, **kwargs):
    raise OSError(code, os.strerror(code))
  with monkeypatch.context() as m:
    m.setattr(metrics, 'open', refuse, raising=False)
    writer.write(1, {'loss': 1.0})
    assert f'lines wait for room: {os.strerror(code)}' in capsys.readouterr().err
  writer.write(2, {'loss': 1.0})
  assert [line['step'] for line in read(tmp_path)] == [1, 2]


def test_any_other_error_is_not_swallowed(tmp_path):
  (tmp_path / 'metrics.jsonl').mkdir()
  with pytest.raises(IsADirectoryError) as caught:
    MetricsWriter(tmp_path).write(1, {'loss': 1.0})
  assert caught.value.errno == errno.EISDIR


def events(folder):
  """[(step, tag, value)] and the steps from which an events file hides earlier ones."""
  from tensorboardX.proto.event_pb2 import Event
  scalars, purges = [], []
  for path in sorted((folder / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:   # TFRecord: length u64, its crc u32, the record, its crc u32
      size = int.from_bytes(data[:8], 'little')
      event = Event.FromString(data[12:12 + size])
      data = data[16 + size:]
      scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      purges += [event.step] * event.HasField('session_log')
  return scalars, purges


def test_tensorboard_gets_the_numbers_and_a_resumed_run_hides_what_it_repeats(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(10, {'loss': 0.5, 'grad_norm': math.nan, 'note': 'x'})
  assert events(tmp_path) == ([(10, 'loss', 0.5)], [])  # flushed: a killed run keeps them
  writer.write(20, {'loss': 0.25})
  writer.close()
  writer = MetricsWriter(tmp_path)
  writer.truncate_after(10)
  writer.write(20, {'loss': 0.125})
  writer.close()
  scalars, purges = events(tmp_path)
  assert sorted(scalars) == [(10, 'loss', 0.5), (20, 'loss', 0.125), (20, 'loss', 0.25)]
  assert purges == [11]


# Utilisation.


@pytest.mark.parametrize('kind, tera', [
    ('TPU v2', 22.5), ('TPU v3', 61.5), ('TPU v4', 275), ('TPU v5 lite', 197), ('TPU v5e', 197),
    ('TPU v5', 459), ('TPU v5p', 459), ('TPU v6 lite', 918), ('TPU v6e', 918), ('TPU7x', 1153.5),
    ('NVIDIA A100-SXM4-40GB', 312), ('NVIDIA A100 80GB PCIe', 312),
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835.5),
    ('NVIDIA H200', 989), ('NVIDIA H200 NVL', 835.5), ('NVIDIA GH200 480GB', 989),
    ('NVIDIA B200', 2250), ('NVIDIA GB200', 2500), ('NVIDIA L4', 121), ('NVIDIA L40S', 362),
    ('Tesla V100-SXM2-16GB', 125), ('Tesla V100-PCIE-32GB', 112), ('Tesla T4', 65)])
def test_published_peaks(kind, tera):
  assert metrics.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize('kind', ['cpu', 'TPU v9', 'TPU v4 lite', 'NVIDIA L40', 'NVIDIA H20',
                                  'NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'NVIDIA H100', ''])
def test_an_unknown_peak_is_none_and_so_is_the_utilisation(kind):
  assert metrics.peak_flops(kind) is None
  assert metrics.model_flops_utilization(1e3, 1e9, kind=kind, count=1) is None


def test_utilisation_of_a_published_run():
  # Chowdhery et al. 2022, table 3: PaLM 540B, 238.3K tokens/s on 6144 TPU v4, 46.2% MFU with
  # attention; appendix B: 6 N + 12 L H Q T FLOPs a token.
  flops = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
  used = metrics.model_flops_utilization(238.3e3, flops, kind='TPU v4', count=6144)
  assert used == pytest.approx(0.462, abs=0.001)


# Progress.


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
  now = iter([100.0, 160.0, 170.0, 180.0])
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(now))
  stream = io.StringIO()
  progress = Progress(4000, 0, stream=stream)
  progress.update(10, 5.5, 1234.4)      # 60 s of compilation and 10 steps
  progress.update(110, 4.25, 56789.0)   # 10 s for 100 steps
  progress.say('saved')
  progress.update(4000, math.nan, 1.0)
  progress.close()
  assert stream.getvalue().splitlines() == [
      'step   10/4000  loss 5.5000  1,234 tokens/s  6:39:00 left',
      'step  110/4000  loss 4.2500  56,789 tokens/s  6:29 left',
      'saved',
      'step 4000/4000  loss nan  1 tokens/s  0:00 left']


def test_a_bar_on_a_terminal():
  stream = Terminal()
  progress = Progress(100, 40, stream=stream)
  progress.update(60, 2.5, 1e4)
  progress.say('saved step 60')
  progress.close()
  text = stream.getvalue()
  assert '60/100' in text
  assert 'loss 2.5000, 10,000 tokens/s' in text
  assert '\nsaved step 60\n' in '\n' + re.sub(r'.*\r', '', text)
  assert re.search(r'60%.*<', text)   # elapsed<left


def test_other_processes_print_nothing():
  stream = Terminal()
  progress = Progress(100, enabled=False, stream=stream)
  progress.update(60, 2.5, 1e4)
  progress.say('x')
  progress.close()
  assert stream.getvalue() == ''


# Memory.


def test_largest_arrays_names_sizes_and_cuts():
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
  put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
  tree = {'params': {'w': put(jnp.zeros((1024, 512)), 'data', 'model'),
                     'b': put(jnp.zeros((1024,), jnp.bfloat16))},
          'none': None, 'key': jax.random.key(0), 'steps': jnp.zeros((512,), jnp.int32)}
  lines = [re.sub(' +', ' ', line) for line in metrics.largest_arrays(tree, n=3)]
  assert lines == ["params/w float32[1024, 512] 2.0 MiB ('data', 'model') 256.0 KiB a device",
                   'params/b bfloat16[1024] 2.0 KiB () 2.0 KiB a device',
                   'steps int32[512] 2.0 KiB one device 2.0 KiB a device']
  assert len(metrics.largest_arrays(tree)) == 4
  assert metrics.largest_arrays({}) == []


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='Linux tells the start there')
def test_seconds_of_the_process_are_counted_from_its_start():
  code = 'from longctx.training import metrics; print(metrics.process_seconds(), flush=True)'
  began = time.monotonic()
  child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
  with child:
    told = float(child.stdout.readline())
    elapsed = time.monotonic() - began
  assert elapsed - 0.5 < told < elapsed + 0.1   # imports alone take longer


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='Linux tells VmHWM there')
def test_peak_memory_is_the_processs_high_water_mark():
  block = np.ones(2**24)
  peak = metrics.peak_memory_bytes()
  with open('/proc/self/status') as f:
    kib = int(re.search(r'VmHWM:\s+(\d+) kB', f.read())[1])
  assert peak == pytest.approx(kib * 1024, rel=0.02)
  assert peak > block.nbytes


def test_peak_memory_is_the_devices_where_they_know(monkeypatch):
  class Device:
    def __init__(self, stats):
      self.memory_stats = lambda: stats
  devices = [Device({'peak_bytes_in_use': 5}), Device(None), Device({'peak_bytes_in_use': 7})]
  monkeypatch.setattr(metrics.jax, 'local_devices', lambda: devices)
  assert metrics.peak_memory_bytes() == 7
