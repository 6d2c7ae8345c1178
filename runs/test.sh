#!/usr/bin/env bash
# The tests, from nothing: about 4 minutes on two cores after the install. Arguments go to pytest.
source "$(dirname "$0")/env.sh"
ruff check .
python -m pytest "$@"
