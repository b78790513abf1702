#!/bin/sh
# A rank with a child in its group and one in a session of its own; it says who they are, and then waits or fails.
sleep 600 &
child=$!
setsid sleep 600 &
echo "rank $RANK ready, process $$, agent $PPID, child $child, apart $!"
case "$1:$RANK" in
fail:2)
    sleep 0.5
    echo "the reason of rank 2" >&2
    exit 7
    ;;
done:*)
    kill $child $!
    env | grep -E '^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|MASTER_ADDR|NCCL_X|FROM_FILE)=' | sort | tr '\n' ' '
    echo "in $PWD with $2"
    exit 0
    ;;
deaf:*) trap '' TERM INT ;;
esac
while true; do sleep 600; done
