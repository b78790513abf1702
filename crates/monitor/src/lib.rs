//! Counters, timers and the lines a user reads while training.
