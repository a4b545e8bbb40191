# How both demos start ranks: run_job; and say. Sourced by them.
mpirun=${MPIRUN:-mpirun}
options=""
say() { printf '%s\n' "$*"; }

# Open MPI starts two ranks on one core with --oversubscribe only, and as root, as in most
# containers, when it is told to. A demo may decide that for you: mdattn itself never does.
case $("$mpirun" --version 2>&1) in
*"Open MPI"* | *OpenRTE*)
    options="--oversubscribe"
    if [ "$(id -u)" = 0 ]; then
        say "\$ export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    ;;
esac

# run_job LOG ARGUMENT...: mdattn run on 2 ranks, which write into LOG, after showing that command.
run_job() {
    log=$1
    shift
    say "\$ $mpirun${options:+ $options} -n 2 \\"
    say "mdattn run $*" | fold -s -w 72 | sed 's/^/    /; s/ *$/ \\/'
    say "    >$log 2>&1"
    "$mpirun" $options -n 2 mdattn run "$@" </dev/null >"$log" 2>&1 || {
        code=$?
        cat "$log"
        say "The job ended with exit code $code; the lines above are in $log."
        exit "$code"
    }
    grep '^mdattn: .* items done' "$log" | sed 's/^mdattn: //'
}
