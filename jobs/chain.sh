#!/bin/bash
# Longer than the time limit:  jobs/chain.sh 5 jobs/one-node.sbatch DATA.h5 OUT.h5 [more]
# Five jobs one after the other, each resuming the one before; the rest is cancelled when one is done.
# Options for sbatch go before the script, e.g.  jobs/chain.sh 5 --nodes=4 jobs/many-nodes.sbatch …
set -euo pipefail
links=$1
shift
job=
for ((link = 1; link <= links; link++)); do
    after=()
    [ -n "$job" ] && after=("--dependency=afternotok:$job" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable "${after[@]}" "$@")
    job=${job%%;*}
    echo "$job"
done
