"""The figure of loss by position: what is drawn, read back from the figure and the file."""

import struct

import pytest

from longctx.draw import position


def mode(values, tokens=None, few=()):
  rows = [dict(first=0, last=0, tokens=t, bits_per_byte=v, few=i in few) for i, (v, t) in
          enumerate(zip(values, tokens or range(1, 1 + len(values))))]
  return dict(tokens=sum(r['tokens'] for r in rows), bits_per_byte=2.25, positions=rows)


def run(**modes):
  return dict(split='validation', length=8, modes=modes)


def test_every_run_and_mode_is_a_line_with_its_values(tmp_path, drawn):
  runs = {'a': run(full=mode([8.0, 4.0, 3.0, 2.5]), sliding=mode([8.0, 3.9, 2.8, 2.4], few={0})),
          'b': run(full=mode([7.0, None, 2.0]))}
  position.draw(runs, tmp_path / 'f.png')
  axes, counts = drawn[0].axes
  lines = {line.get_label(): [list(x) for x in line.get_data()] for line in axes.get_lines()}
  assert lines == {
      'a, full: 2.250 overall': [[0, 1, 2, 3], [8.0, 4.0, 3.0, 2.5]],
      'a, sliding: 2.250 overall': [[1, 2, 3], [3.9, 2.8, 2.4]],   # of few tokens: left out
      'b, full: 2.250 overall': [[0, 2], [7.0, 2.0]]}  # a bin without a value is left out
  assert [text.get_text() for text in axes.texts] == ['2.50', '2.40', '2.00']
  assert [bar.get_height() for bar in counts.patches] == [1, 2, 3, 4] * 2
  assert [t.get_text() for t in counts.get_xticklabels()] == ['0', '1', '2–3', '4–7']
  low, high = axes.get_ylim()
  assert low < 2.0
  assert high > 8.0
  assert 'bits per byte' in axes.get_ylabel()
  assert 'validation, 10 tokens, context 8 tokens' in axes.get_title()


def test_the_band_is_the_interval_where_there_is_one(tmp_path, drawn):
  found = mode([8.0, 4.0, 3.0, 2.5])
  for i, low, high in ((1, 3.0, 5.0), (2, 1.6, 4.4), (3, 0.0, 90.0)):
    found['positions'][i].update(bits_per_byte_low=low, bits_per_byte_high=high)
  found['positions'][0].update(bits_per_byte_low=None, bits_per_byte_high=None)
  position.draw({'a': run(full=found), 'b': run(full=mode([8.0, 2.0]))}, tmp_path / 'f.png')
  band, none = drawn[0].axes[0].collections   # of a file that an earlier version wrote there is none
  ends = {tuple(map(float, point)) for path in band.get_paths() for point in path.vertices}
  assert {(1, 3.0), (1, 5.0), (2, 1.6), (2, 4.4), (3, 0.0), (3, 90.0)} <= ends
  assert min(x for x, _ in ends) == 1 and not len(none.get_paths())
  low, high = drawn[0].axes[0].get_ylim()
  assert 1 < low < 1.6 and high < 20   # all of the bands but what is wider than its point is high
  alone = mode([8.0, 4.0])
  alone['positions'][1].update(bits_per_byte_low=3.0, bits_per_byte_high=5.0)
  position.draw({'a': run(full=alone)}, tmp_path / 'f.png')
  assert [[1, 3.0], [1, 5.0]] in [s.tolist() for c in drawn[1].axes[0].collections if hasattr(c, 'get_segments')
                                  for s in c.get_segments() if len(s)]


def test_the_file_is_a_png_of_readable_size(tmp_path):
  path = tmp_path / 'f.png'
  position.draw({'a': run(full=mode([3.0, 2.0]))}, path)
  head = path.read_bytes()[:24]
  assert head[:8] == b'\x89PNG\r\n\x1a\n'
  width, height = struct.unpack('>II', head[16:24])
  assert width >= 1000
  assert height >= 600


@pytest.mark.parametrize('values', [[None, None], [2.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-9, 30.0]])
def test_odd_values_still_make_a_figure(tmp_path, values):
  path = tmp_path / 'f.png'
  found = mode(values)
  if None in values:
    found['bits_per_byte'] = None
  position.draw({'a': run(full=found)}, path)
  assert path.stat().st_size > 5000


def test_the_scale_is_logarithmic_where_the_range_is_wide(tmp_path, drawn):
  for values in ([8.0, 2.0], [2.6, 2.5]):
    position.draw({'a': run(full=mode(values))}, tmp_path / 'f.png')
  assert [figure.axes[0].get_yscale() for figure in drawn] == ['log', 'linear']


def test_names_of_bins():
  assert position.labels(12) == ['0', '1', '2–3', '4–7', '8–15', '16–31', '32–63', '64–127',
                                 '128–255', '256–511', '512–1k', '1k–2k']
  assert position.labels(22)[-2:] == ['512k–1M', '1M–2M']
  assert position.labels(1) == ['0']
