//! What right configs come to.

use deepspeed_config::{Code, Config, Precision, TagValidation, ZeroStage};
use deepspeed_core::DType;

use crate::{config, resolve};

#[test]
fn the_defaults() {
    let config = Config::default();
    assert_eq!(config.precision, Precision::Fp32);
    assert_eq!(config.zero.stage, ZeroStage::Zero);
    assert_eq!(config.zero.reduce_bucket_size, 500_000_000);
    assert_eq!(config.gradient_clipping, 1.0);
    assert_eq!(config.gradient_predivide_factor, 1.0);
    assert_eq!(config.fp16.initial_scale_power, 16);
    assert_eq!(config.fp16.loss_scale_window, 1000);
    assert_eq!(config.fp16.hysteresis, 2);
    assert_eq!(config.fp16.min_loss_scale, 1.0);
    assert!(config.fp16.dynamic() && !config.fp16.consecutive_hysteresis);
    assert!(config.bf16.check_grad_overflow);
    assert_eq!(config.checkpoint.tag_validation, TagValidation::Warn);
    assert_eq!(config.steps_per_print, None);
    assert_eq!((config.communication_dtype, config.grad_accum_dtype), (None, None));
    assert!(config.optimizer.is_none() && config.scheduler.is_none());
    assert!(config.differences_from_default().is_empty());
}

#[test]
fn the_sample_of_the_getting_started_page() {
    let text = r#"{
  "train_batch_size": 8,
  "gradient_accumulation_steps": 1,
  "optimizer": {
    "type": "Adam",
    "params": {
      "lr": 0.00015
    }
  },
  "fp16": {
    "enabled": true
  },
  "zero_optimization": true
}"#;
    let resolved = resolve(text).unwrap();
    let config = resolved.config;
    assert_eq!(config.precision, Precision::Fp16);
    assert_eq!(config.zero.stage, ZeroStage::One);
    let optimizer = config.optimizer.as_ref().unwrap();
    assert_eq!((optimizer.kind.as_str(), &optimizer.params["lr"]), ("Adam", &serde_json::json!(0.00015)));
    assert_eq!(config.resolve_batch(2, "").unwrap().micro, 4);
    assert_eq!(resolved.warnings.len(), 1);
    assert_eq!(resolved.warnings[0].code, Code::Deprecated);
    let differences: Vec<String> =
        config.differences_from_default().iter().map(ToString::to_string).collect();
    assert_eq!(
        differences,
        [
            "train_batch_size = 8",
            "gradient_accumulation_steps = 1",
            "optimizer.type = \"Adam\"",
            "optimizer.params.lr = 0.00015 (default 0.001)",
            "fp16.enabled = true (default false)",
            "zero_optimization.stage = 1 (default 0)",
        ]
    );
}

#[test]
fn lax_numbers_and_words() {
    let config = config(
        r#"{
        // comments of all kinds
        # are allowed
        "zero_optimization": {"stage": 2.0, "reduce_bucket_size": 5e7}, /* here too */
        "train_batch_size": 16.0,
        "steps_per_print": Infinity,
        "communication_data_type": "BFloat16",
        "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "torch.bfloat16",},
        "checkpoint": {"tag_validation": "fail"},
        "bfloat16": {"enabled": true},
    }"#,
    );
    assert_eq!(config.zero.stage, ZeroStage::Two);
    assert_eq!(config.zero.reduce_bucket_size, 50_000_000);
    assert_eq!(
        config.batch.train.as_ref().map(|given| (given.value, given.origin.as_str())),
        Some((16, "line 5"))
    );
    assert_eq!(config.steps_per_print, None);
    assert_eq!(config.communication_dtype, Some(DType::BF16));
    assert_eq!(config.grad_accum_dtype, Some(DType::F32));
    assert_eq!(config.data_types.buffer_dtype, Some(DType::BF16));
    assert_eq!(config.checkpoint.tag_validation, TagValidation::Fail);
    assert_eq!(config.precision, Precision::Bf16);
}

#[test]
fn null_means_not_set() {
    let config =
        config(r#"{"train_batch_size": null, "gradient_clipping": null, "optimizer": null, "fp16": null}"#);
    assert!(config.batch.train.is_none() && config.optimizer.is_none());
    assert_eq!(config.gradient_clipping, 1.0);
}

#[test]
fn false_means_stage_0() {
    assert_eq!(config(r#"{"zero_optimization": false}"#).zero.stage, ZeroStage::Zero);
}

#[test]
fn the_raw_config_is_kept() {
    let text = r#"{"train_batch_size": 8, "steps_per_print": Infinity, "_mine": [1, {"a": null}]}"#;
    assert_eq!(
        config(text).document().json(),
        serde_json::json!({"train_batch_size": 8, "steps_per_print": "Infinity", "_mine": [1, {"a": null}]})
    );
}

#[test]
fn settings_without_effect_are_said() {
    let resolved =
        resolve(r#"{"zero_optimization": {"stage": 1, "overlap_comm": true, "reduce_scatter": true}}"#)
            .unwrap();
    assert_eq!(resolved.warnings.len(), 1);
    assert_eq!(resolved.warnings[0].path, "zero_optimization.overlap_comm");
    assert_eq!(resolved.config.zero.overlap_comm, Some(true));
}

#[test]
fn callers_can_point_at_a_setting() {
    let config = config("{\n  \"optimizer\": {\"type\": \"Adam\", \"params\": {\"lr\": 0.5}}\n}");
    let error =
        config.error_at(Code::OutOfRange, "optimizer.params.lr", "lr 0.5 is absurd", ["try 1e-3".to_owned()]);
    assert_eq!(
        error.to_string(),
        "\
lr 0.5 is absurd [config::out_of_range]
 --> ds_config.json:2:50 (optimizer.params.lr)
  |
2 |   \"optimizer\": {\"type\": \"Adam\", \"params\": {\"lr\": 0.5}}
  |                                                  ^^^
  = hint: try 1e-3"
    );
}

#[test]
fn parameters_are_canonical() {
    let config = config(
        r#"{"optimizer": {"type": "adam", "params": {"lr": 1, "eps": null, "adamw_mode": false}},
        "scheduler": {"type": "warmupdecaylr", "params": {"total_num_steps": 1e3, "warmup_num_steps": 1e1,
            "warmup_max_lr": null, "warmup_type": "LINEAR"}}}"#,
    );
    assert_eq!(
        serde_json::Value::Object(config.optimizer.unwrap().params),
        serde_json::json!({"lr": 1, "adam_w_mode": false})
    );
    assert_eq!(
        serde_json::Value::Object(config.scheduler.unwrap().params),
        serde_json::json!({
            "total_num_steps": 1000.0, "warmup_num_steps": 10, "warmup_max_lr": null, "warmup_type": "linear"
        })
    );
}

#[test]
fn parameters_of_torch_classes_are_left_alone() {
    let config = config(r#"{"optimizer": {"type": "RMSprop", "params": {"alpha": 0.9, "momentum": null}}}"#);
    assert_eq!(
        serde_json::Value::Object(config.optimizer.unwrap().params),
        serde_json::json!({"alpha": 0.9, "momentum": null})
    );
}
