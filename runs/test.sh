#!/usr/bin/env bash
# The tests, from nothing, in two processes: about three minutes on two cores after the install. Arguments go to pytest.
source "$(dirname "$0")/env.sh"
ruff check .
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
