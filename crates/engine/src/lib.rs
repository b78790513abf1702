//! The training step as a state machine over config, zero, optim, comm and checkpoint.
