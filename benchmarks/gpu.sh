#!/usr/bin/env bash
# What `make gpu` runs once ddfast is built: the GPU tests, then every operator and method in small.
# Writes $RESULTS/results.csv and .json; the exit status is that of the first part that failed.
set -uo pipefail
status=0
"$PYTHON" -c "import ddfast, torch; print(torch.cuda.get_device_name()); ddfast.backends()" || status=1
# The command line's tests need jsonargparse, which such a machine may lack; none is a GPU test.
timeout 300 "$PYTHON" -m pytest -q -m gpu --ignore=tests/test_cli.py \
  --ignore=tests/bench/test_command.py -p no:cacheprovider -rs --durations=10 || status=$?
# An interrupt, should it take too long all the same, leaves what was measured in the files.
timeout --signal=INT --kill-after=20 290 "$PYTHON" -m ddfast.bench --quick --device cuda \
  --budget 240 --quiet --out "$RESULTS/results.csv" --json "$RESULTS/results.json" || status=$?
exit $status
