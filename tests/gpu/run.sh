#!/bin/bash
# Everything that needs a GPU, in one go: facts, the tests of the cuda driver, its figures and the examples.
# usage: tests/gpu/run.sh [OUTPUT_FOLDER]. What a step prints is in the folder, a summary at the end.
cd "$(dirname "$0")/../.." || exit 1
out=${1:-build/gpu}
mkdir -p "$out" build/gpu
python=${PYTHON:-python3}
failed=0
step() { # name, seconds, command...
	local name=$1 limit=$2 start=$SECONDS
	shift 2
	timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
	local status=$?
	[ $status = 0 ] || failed=1
	echo "$name: exit $status, $((SECONDS - start)) s"
}
steps=${STEPS:-facts tests bench examples}
for s in $steps; do
	case $s in
	facts)
		gcc -O2 -Icsrc/include -Iclient/include tests/gpu/facts.c -o build/gpu/facts -ldl -pthread || exit 1
		step facts 60 build/gpu/facts tests/gpu/kernels.ptx ${FACTS:-} ;;
	tests)
		GMEM_TEST_GPU=1 step tests 150 "$python" -m pytest tests/integration/test_cuda.py -q -p no:cacheprovider ${PYTEST_FLAGS:-} ;;
	bench)
		step bench 100 "$python" tests/gpu/bench.py ;;
	examples)
		for e in cupy torch; do step "example_$e" 60 "$python" "client/examples/cuda_$e.py"; done
		# numba_cuda of today wants a function that NumPy 2.5 does not have any more
		step example_numba 60 "$python" -c "import numpy, runpy; vars(numpy).setdefault('row_stack', numpy.vstack)
vars(numpy).setdefault('in1d', numpy.isin); vars(numpy).setdefault('trapz', numpy.trapezoid); runpy.run_path('client/examples/cuda_numba.py')" ;;
	esac
done
for s in $steps; do
	[ "$s" = tests ] && tail -40 "$out/tests.txt"
	[ "$s" = bench ] && cat "$out/bench.txt"
	[ "$s" = examples ] && tail -n 6 "$out"/example_*.txt
done
exit $failed
