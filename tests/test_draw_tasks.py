"""Figures of tasks, read back from the figure: accuracy by length and by depth, dark pages."""

import io

import numpy as np
import pytest

from longctx.draw import accuracy, curve, heatmap, theme
from longctx.draw.accuracy import Line, Point

LINES = {'niah': Line([Point(2048, .5, .4, .6, 20), Point(1024, .9, .8, .95, 20)], .1),
         'vt': Line([Point(1024, .3, .2, .4, 20), Point(4096, .0, .0, .0, 0)], .25)}


def test_every_line_has_its_points_bands_and_floor(drawn):
  accuracy.draw(LINES, io.BytesIO(), title='model', trained=1536)
  axes, = drawn[0].axes
  lines = {line.get_label(): np.array(line.get_data()).tolist() for line in axes.get_lines()}
  assert lines['niah'] == [[1024, 2048], [90, 50]]   # in order of length
  assert lines['vt'] == [[1024], [30]]               # a point of no example is no point
  assert lines['trained at 1.5k'][0] == [1536, 1536]
  across = [
    line for line in axes.get_lines() if line.get_linestyle() == ':' and len(line.get_ydata())
  ]
  assert sorted(line.get_ydata()[0] for line in across) == [10, 25]
  band, bar = axes.collections
  (x0, y0), (x1, y1) = band.get_paths()[0].get_extents().get_points()
  assert (x0, y0, x1, y1) == (1024, 40, 2048, 95)
  assert bar.get_segments()[0][:, 1].tolist() == [20, 40]   # one point: an upright line
  assert axes.get_xscale() == 'log'
  assert [t.get_text() for t in axes.get_xticklabels()] == ['1k', '1.5k', '2k']


def test_one_floor_of_all_lines_is_drawn_once(drawn):
  accuracy.draw(
    {name: line._replace(floor=0.2) for name, line in LINES.items()}, io.BytesIO(), title=''
  )
  dotted = [line for line in drawn[0].axes[0].get_lines() if line.get_linestyle() == ':']
  assert [line.get_label() for line in dotted] == ['guessing']
  assert dotted[0].get_ydata()[0] == 20


def test_nothing_to_draw_is_an_error():
  with pytest.raises(ValueError, match='no example'):
    accuracy.draw({'a': Line([Point(1024, 0, 0, 0, 0)])}, io.BytesIO(), title='')
  with pytest.raises(ValueError, match='no example'):
    heatmap.draw(heatmap.grid([], 3), io.BytesIO(), title='')


def test_examples_fall_into_bands_of_depth():
  cells = heatmap.grid([(512, 0.0, 1), (512, 0.49, 0), (512, 0.5, .5), (256, 1.0, 1)], rows=2)
  assert cells.lengths == [256, 512]
  np.testing.assert_array_equal(cells.score_RC, [[np.nan, .5], [1, .5]])
  np.testing.assert_array_equal(cells.count_RC, [[0, 2], [1, 1]])
  with pytest.raises(ValueError, match=r'depth=1\.2'):
    heatmap.grid([(512, 1.2, 1)], rows=2)


def test_the_heat_map_shows_each_cell(drawn):
  cells = heatmap.grid([(512, 0.0, 1), (512, 0.4, 0), (512, 0.5, .25), (256, 1.0, 1)], rows=2)
  heatmap.draw(cells, io.BytesIO(), title='niah')
  axes = drawn[0].axes[0]
  shown = axes.images[0].get_array()
  np.testing.assert_array_equal(shown.filled(-1), [[-1, 50], [100, 25]])
  assert [t.get_text() for t in axes.texts] == ['50\nn 2', '100\nn 1', '25\nn 1']
  assert [t.get_text() for t in axes.get_yticklabels()] == ['0–50%', '50–100%']
  assert axes.get_ylim()[0] > axes.get_ylim()[1]
  assert 'niah (1 to 2 a cell)' in axes.get_title()
  colour = lambda x: ['#' + ''.join(f'{round(255 * c):02X}' for c in axes.images[0].cmap(x)[:3])]
  assert colour(0.0) + colour(1.0) == ['#F0496E', '#0CD79F']


def test_many_cells_hold_no_numbers(drawn):
  examples = [(512 * n, d / 40, 1) for n in range(1, 31) for d in range(40)]
  heatmap.draw(heatmap.grid(examples, rows=20), io.BytesIO(), title='')
  assert not drawn[0].axes[0].texts
  assert '(2 a cell)' in drawn[0].axes[0].get_title()


def test_a_dark_figure_is_dark_and_the_next_is_not(drawn):
  file = io.BytesIO()
  with theme.dark():
    accuracy.draw(LINES, file, title='')
  accuracy.draw(LINES, io.BytesIO(), title='')
  light = [sum(figure.get_facecolor()[:3]) / 3 for figure in drawn]
  assert light[0] < 0.15 and light[1] == 1
  assert file.getvalue().startswith(b'\x89PNG')


def test_short_numbers():
  assert [theme.short(n) for n in (512, 1024, 1536, 131072, 2**21)] == [
    '512',
    '1k',
    '1.5k',
    '128k',
    '2M',
  ]


def test_the_curve_of_a_run_shows_batches_their_means_and_held_out_text(drawn):
  metrics = [dict(step=i, loss=float(i % 2)) for i in range(200)]
  metrics[4]['loss'] = None   # was not finite
  metrics[9]['validation_loss'] = .5
  curve.draw(metrics, io.BytesIO(), title='run')
  lines = {line.get_label(): np.array(line.get_data()) for line in drawn[0].axes[0].get_lines()}
  assert lines['batches'].shape == (2, 199)
  np.testing.assert_allclose(lines['mean of 2'][:, 0], [.5, .5])
  assert lines['held out'].tolist() == [[9], [.5]]
  with pytest.raises(ValueError, match='no loss'):
    curve.draw([dict(step=1, loss=None)], io.BytesIO(), title='')
