"""python launch/versions.py: the versions that workers get, a line each, as pip takes constraints.

Of all that is installed here: what requirements.txt asks for, and what that asks for in turn. What is here for
tests and checks alone would only stand in the way. Above all libtpu, which the check before a launch compiles
with: workers get the one that their jax[tpu] asks for, and a constraint to another leaves pip no solution.
Held by: tests/test_launch.py.
"""

import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ('gcsfs',)   # workers get it; the launching machine need not have it


def versions() -> dict[str, str]:
  """{package: version}, of this environment."""
  from packaging.requirements import Requirement
  from packaging.utils import canonicalize_name
  from packaging.version import Version
  lines = [line.partition('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
  asked = [Requirement(line) for line in lines if line]
  direct = {canonicalize_name(each.name) for each in asked}
  asked += map(Requirement, OPTIONAL)
  found, seen = {}, set()
  while asked:
    each = asked.pop()
    name = canonicalize_name(each.name)
    for extra in {'', *each.extras} - {e for n, e in seen if n == name}:
      seen.add((name, extra))
      try:
        package = metadata.distribution(name)
      except metadata.PackageNotFoundError as e:
        if name in direct:
          raise SystemExit(f'launch: {each.name}: requirements.txt asks for it, and it is not installed in '
                           f'{sys.prefix}; make setup') from e
        continue
      found[name] = Version(package.version).public   # of a build of this machine's own: the published one
      asked += [more for more in map(Requirement, package.requires or ())
                if more.marker is None or more.marker.evaluate({'extra': extra})]
  return found


if __name__ == '__main__':
  try:
    print('\n'.join(f'{name}=={version}' for name, version in sorted(versions().items())))
  except ModuleNotFoundError as e:
    sys.exit(f'launch: {sys.executable}: {e}; make setup, or set PYTHON to the Python of an environment with '
             'requirements.txt')
