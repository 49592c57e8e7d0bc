"""The report in a real browser, where there is one: a silent console, and pictures that show."""

import shutil
import subprocess

import numpy as np
import pytest
from matplotlib import image

from longctx.data.tokenizer import Bytes
from longctx.evaluation import inspect_page, page, report
from tests.test_report import looked, write

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--hide-scrollbars',
  '--enable-logging=stderr',
)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f'none of {", ".join(BROWSERS)} is installed')


def shown(path, folder, *flags):
  """(what a screenshot of a page has, [height, width, 3]; the lines of the console)."""
  picture = folder / 'screenshot.png'
  done = subprocess.run(
      [BROWSER, *FLAGS, f'--user-data-dir={folder}/profile', f'--screenshot={picture}',
       '--virtual-time-budget=20000', *flags, path.as_uri()],
      capture_output=True, text=True, timeout=300, check=True)
  console = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
  return image.imread(picture)[..., :3], console


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  folder = write(tmp_path_factory.mktemp('browser') / 'w')
  found = looked(occlusion_T=np.eye(32, dtype=np.float32)[12])
  section = inspect_page.section(
    'passkey', found, inspect_page.text_of(found, Bytes(), [(11, 18)], 24), ''
  )
  report.write(str(folder), [section])
  return folder / 'report.html'


@pytest.mark.parametrize('scheme, light', [(1, True), (0, False)], ids=['light', 'dark'])
def test_the_report_opens_from_disk_without_a_complaint(path, tmp_path, scheme, light):
  seen, console = shown(path, tmp_path, '--window-size=1100,5200',
                        f'--blink-settings=preferredColorScheme={scheme}')
  assert not console
  assert (seen.mean((0, 1)) > 0.8).all() if light else (seen.mean((0, 1)) < 0.25).all()
  # The colour of a figure's lines, which nothing else on the page has: figures are shown.
  assert (np.abs(seen - np.array([0x1f, 0x77, 0xb4]) / 255).max(-1) < 0.02).sum() > 200


def test_the_console_would_tell_of_what_the_policy_forbids(tmp_path):
  bad = tmp_path / 'bad.html'
  bad.write_bytes(page.page('t', ['<img src="missing.png"><script>alert(1)</script>']))
  _, console = shown(bad, tmp_path, '--window-size=400,400')
  assert any('Content Security Policy' in line for line in console)
