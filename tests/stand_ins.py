"""Other people's commands (gcloud, kubectl, srun ...), stood in for by scripts that record and answer."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ('gcloud', 'kubectl', 'srun', 'squeue', 'scancel', 'gcsfuse', 'docker', 'python', 'tar', 'ssh-add',
         'ssh-keygen')


class StandIns:
  """A folder for PATH, the answers that its commands give in turn, and the calls that they got."""

  def __init__(self, folder: Path):
    self.folder, self.calls_file, self.answers_file = folder, folder / 'calls', folder / 'answers'
    (folder / 'bin').mkdir()
    for name in NAMES:
      (folder / 'bin' / name).symlink_to(ROOT / 'tests/programs/stand_in.sh')
    (folder / 'bin/xpk').symlink_to(ROOT / 'tests/programs/stand_in_xpk.sh')
    self.answers()

  def answers(self, *rows: tuple) -> None:
    """(pattern, status, output): see programs/stand_in.sh."""
    for given in self.folder.glob('answers.*'):
      given.rmdir()
    self.answers_file.write_text(''.join('\t'.join(map(str, row)) + '\n' for row in rows))

  def run(self, *command: str, timeout: int = 60, **env: str) -> subprocess.CompletedProcess:
    """A launcher of launch/, its stdout and stderr apart."""
    known = dict(PATH=f'{self.folder}/bin:/usr/bin:/bin', HOME=str(self.folder), CALLS=str(self.calls_file),
                 ANSWERS=str(self.answers_file), PYTHON=f'{self.folder}/bin/python',
                 TMPDIR=str(self.folder), HOSTNAME='here', XLA_FLAGS='')
    return subprocess.run([str(ROOT / 'launch' / command[0]), *command[1:]], env=os.environ | known | env,
                          capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

  def calls(self, *without: str) -> list[str]:
    """The calls in order, less flags that match one of `without`, temporary paths by their last part."""
    if not self.calls_file.exists():
      return []
    lines = re.sub(rf'{re.escape(str(self.folder))}/tmp\.\w+', 'TMP', self.calls_file.read_text())
    for flag in without:
      lines = re.sub(rf' {flag}', '', lines)
    return lines.splitlines()
