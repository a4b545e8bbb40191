# What both demos need to start ranks: $mpirun, its $options, and say. Sourced by them.
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
