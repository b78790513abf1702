//! ds_config.json to a typed, position-aware configuration.
