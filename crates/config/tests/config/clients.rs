//! The shapes that accelerate, transformers and Lightning emit.

use deepspeed_config::{Precision, ZeroStage};

use crate::{config, resolve};

#[test]
fn accelerate_with_its_plugin() {
    let config = config(
        r#"{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2,
            "offload_optimizer": {"device": "none", "nvme_path": null},
            "offload_param": {"device": "none", "nvme_path": null},
            "stage3_gather_16bit_weights_on_model_save": false},
        "gradient_clipping": 1.0, "steps_per_print": Infinity,
        "bf16": {"enabled": true}, "fp16": {"enabled": false, "auto_cast": true},
        "zero_allow_untested_optimizer": true, "msamp": {"enabled": false}}"#,
    );
    assert_eq!((config.precision, config.zero.stage), (Precision::Bf16, ZeroStage::Two));
    assert!(config.zero_allow_untested_optimizer);
    assert_eq!(config.resolve_batch(2, "WORLD_SIZE").unwrap().train, 16);
}

#[test]
fn a_config_the_trainer_has_filled_in() {
    let config = config(
        r#"{"fp16": {"enabled": false, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": true},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.0}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 5e-5,
                "warmup_num_steps": 1, "total_num_steps": 100}},
        "zero_optimization": {"stage": 2, "allgather_partitions": true, "allgather_bucket_size": 2e8,
                "overlap_comm": true, "reduce_scatter": true, "reduce_bucket_size": 589824,
                "contiguous_gradients": true, "round_robin_gradients": true},
        "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "steps_per_print": Infinity,
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "wall_clock_breakdown": false,
        "checkpoint": {"use_node_local_storage": false}}"#,
    );
    assert_eq!(config.scheduler.unwrap().params["total_num_steps"], 100);
}

#[test]
fn leftovers_in_sub_blocks_mean_the_defaults() {
    let resolved = resolve(
        r#"{"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
        "bf16": {"enabled": "auto"}}"#,
    )
    .unwrap();
    assert_eq!(resolved.config.zero.reduce_bucket_size, 500_000_000);
    assert_eq!(resolved.config.precision, Precision::Fp32);
    assert_eq!(resolved.warnings.len(), 1, "an enabled that stayed auto is worth a word");
}

#[test]
fn lightnings_default_config() {
    let resolved = resolve(
        r#"{"activation_checkpointing": {"partition_activations": false, "cpu_checkpointing": false,
            "contiguous_memory_optimization": false, "synchronize_checkpoint_boundary": false},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": false, "overlap_events": true, "thread_count": 1},
        "zero_allow_untested_optimizer": true,
        "zero_optimization": {"stage": 2, "contiguous_gradients": true, "overlap_comm": true,
            "allgather_partitions": true, "reduce_scatter": true, "allgather_bucket_size": 200000000,
            "reduce_bucket_size": 200000000, "sub_group_size": 1000000000000},
        "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0,
        "bf16": {"enabled": true}}"#,
    )
    .unwrap();
    assert_eq!(resolved.config.gradient_clipping, 0.0);
    assert_eq!(resolved.config.zero.reduce_bucket_size, 200_000_000);
}
