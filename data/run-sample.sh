#!/bin/sh
# The whole job on real data: attention by three strategies on 2 ranks, each verified in float64.
# `make run` calls it; so may you, with mdattn on the PATH: sh data/run-sample.sh [OUT_FOLDER]
set -eu
cd "$(dirname "$0")/.."

data=data/sample.h5
out=${1:-out}
mkdir -p "$out"
. data/launch.sh

say "The queries, keys and values of a language model that reads the Declaration of"
say "Independence: 4 sequences of 257 to 1301 tokens, BF16 and FP16, causal and not."

for strategy in ring allgather ulysses; do
    file=$out/$strategy.h5
    say
    run_job "$out/$strategy.log" "$data" -o "$file" -s "$strategy" --overwrite
    say "\$ mdattn verify $file --data $data"
    mdattn verify "$file" --data "$data"
done

cat <<END

That was: each sequence shared by 2 MPI ranks, read from HDF5, computed in
lockstep, written to one HDF5 file, and compared with float64 attention.
"used" is the share of the allowed rounding error at the worst row and head.

Next, after \`. ${VENV:-.venv}/bin/activate\`:
  mdattn inspect $out/ring.h5        what it holds, who made it and how
  less $out/ring.log                 its plan, the reasons, where the time went
  mdattn make-data big.h5 --items 3 --length 8192 --causal
  mpirun -n 2 mdattn run big.h5 -o big-out.h5
  mdattn run --help                 every option, with examples

docs/tutorial.md goes on with data of your own; README.md: GPUs, Slurm.
END
