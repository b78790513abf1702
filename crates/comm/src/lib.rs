//! Process groups and collectives: world of one, threads, shared memory; the watchdog.
