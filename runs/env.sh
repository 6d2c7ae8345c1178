# Sourced by the other scripts: a virtual environment in .venv (or $VENV) with exactly requirements.txt in it.
# Needs only bash and Python >= 3.11 (the pinned numpy needs it); later calls find it ready.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python >= 3.11 is needed, found $(python3 -V 2>&1)"; exit 1; }
if ! cmp -s requirements.txt "$VENV/installed.txt"; then
    echo "installing requirements.txt into $VENV (once; a few minutes)"
    python3 -m venv "$VENV" || { echo "error: python3 has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
    "$VENV/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$VENV/installed.txt"
fi
PATH="$(cd "$VENV" && pwd)/bin:$PATH"
