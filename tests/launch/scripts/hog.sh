#!/bin/sh
# Rank 1 enters the control group $1 and fills the memory that it allows; the others wait.
if [ "$RANK" = 1 ]; then
    echo $$ >"$1/cgroup.procs" || exit 9
    # Should the group not hold it back, this does.
    ulimit -v 4000000
    # Keeps all that it reads until a line ends.
    exec tail /dev/zero
fi
exec sleep 600
