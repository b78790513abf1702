#!/bin/sh
# As member.sh in the first attempt; any other succeeds.
[ "$DS_RESTART_COUNT" = 0 ] && exec "${0%again.sh}member.sh" "$@"
echo "rank $RANK again: $DS_RESTART_COUNT $DS_RESTART_REASON"
