# Sourced by the other scripts: makes a virtual environment, installs the package, reuses both when they are there.
#   prepare_env PYTHON EXTRAS    sets $python to the environment's interpreter
# The environment is .venv for the default python3 and .venv-X.Y for another version asked for by name.

prepare_env() {
  local base=$1 extras=$2 version folder stamp wanted
  if ! version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    echo "$0: cannot run '$base'; install Python 3.11 or newer, or name one with --python" >&2
    exit 2
  fi
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$0: '$base' is Python $version; Archloom needs 3.11 or newer (name one with --python)" >&2
    exit 2
  fi
  folder=.venv
  [ "$base" = python3 ] || folder=.venv-$version
  python=$folder/bin/python
  if [ ! -x "$python" ] || [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$version" ]; then
    echo "making $folder with Python $version"
    "$base" -m venv --clear "$folder" || {
      echo "$0: no virtual environment; on Debian install the package python$version-venv" >&2
      exit 2
    }
  fi
  # The stamp lists what is installed: every set of extras under the checksum of the files that name dependencies.
  stamp=$folder/archloom-installed
  wanted="$extras $(cat setup.cfg pyproject.toml | cksum)"
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing archloom${extras:+[$extras]} into $folder (some minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    echo "$wanted" >> "$stamp"
  fi
}
