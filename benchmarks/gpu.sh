#!/usr/bin/env bash
# What `make gpu` runs once ddfast is built: the GPU tests, then every benchmark's quick sizes.
# Writes $RESULTS/results.csv; the exit status is that of the first part that failed.
set -uo pipefail
status=0
"$PYTHON" -c "import ddfast, torch; print(torch.cuda.get_device_name()); ddfast.backends()" || status=1
# The command line's tests need jsonargparse, which such a machine may lack; none is a GPU test.
timeout 300 "$PYTHON" -m pytest -q -m gpu --ignore=tests/test_cli.py -p no:cacheprovider -rs \
  --durations=10 || status=$?
for file in benchmarks/bench_*.py; do
  timeout 120 "$PYTHON" "$file" --device cuda --quick --out "$RESULTS/results.csv" || status=$?
done
exit $status
