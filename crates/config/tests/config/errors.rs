//! The reports a user reads.

use deepspeed_config::{Config, Options, Origin};

use crate::{config, problems, report, resolve};

#[test]
fn a_misspelt_key() {
    assert_eq!(
        report("{\n  \"train_batch_size\": 8,\n  \"gradient_clipp1ng\": 1.0\n}"),
        "\
unknown setting `gradient_clipp1ng` [config::unknown_key]
 --> ds_config.json:3:3 (gradient_clipp1ng)
  |
3 |   \"gradient_clipp1ng\": 1.0
  |   ^^^^^^^^^^^^^^^^^^^ no setting has this name
  = hint: did you mean `gradient_clipping`?"
    );
}

#[test]
fn a_misspelt_key_in_a_block() {
    assert_eq!(
        report("{\"zero_optimization\": {\"stage\": 2, \"overlap_com\": true}}"),
        "\
unknown setting `zero_optimization.overlap_com` [config::unknown_key]
 --> ds_config.json:1:36 (zero_optimization.overlap_com)
  |
1 | {\"zero_optimization\": {\"stage\": 2, \"overlap_com\": true}}
  |                                    ^^^^^^^^^^^^^ no setting has this name
  = hint: did you mean `zero_optimization.overlap_comm`?"
    );
}

#[test]
fn a_key_in_the_wrong_block() {
    let text = report("{\"reduce_bucket_size\": 1000}");
    assert!(text.contains("hint: `reduce_bucket_size` belongs in the block `zero_optimization`"), "{text}");
    let text = report("{\"zero_optimization\": {\"steps_per_print\": 1}}");
    assert!(text.contains("hint: `steps_per_print` belongs at the top of the config"), "{text}");
}

#[test]
fn a_misspelt_parameter_of_the_optimizer() {
    let text =
        report("{\"optimizer\": {\"type\": \"AdamW\", \"params\": {\"lr\": 1e-3, \"weight_deacy\": 0.1}}}");
    assert!(text.contains("unknown setting `optimizer.params.weight_deacy`"), "{text}");
    assert!(text.contains("did you mean `optimizer.params.weight_decay`?"), "{text}");
}

#[test]
fn a_duplicate() {
    assert_eq!(
        report("{\n  \"fp16\": {\n    \"enabled\": true,\n    \"enabled\": false\n  }\n}"),
        "\
`fp16.enabled` is set twice [config::duplicate_key]
 --> ds_config.json:4:5 (fp16.enabled)
  |
4 |     \"enabled\": false
  |     ^^^^^^^^^ set again here
  |
3 |     \"enabled\": true,
  |     ^^^^^^^^^ first set here
  = hint: keep one of them"
    );
}

#[test]
fn two_names_of_one_setting() {
    let text = report("{\"bf16\": {\"enabled\": true}, \"bfloat16\": {\"enabled\": true}}");
    assert!(text.contains("`bf16` and `bfloat16` are two names of one setting"), "{text}");
    let text = report(
        "{\"optimizer\": {\"type\": \"Adam\", \"params\": {\"adam_w_mode\": true, \"adamw_mode\": false}}}",
    );
    assert!(text.contains("`adam_w_mode` and `adamw_mode` are two names of one setting"), "{text}");
}

#[test]
fn a_key_like_no_other_gets_no_guess() {
    let text = report("{\"zzz\": 1, \"qqqqqq\": 2}");
    assert!(!text.contains("did you mean"), "{text}");
    assert!(text.contains("DS_CONFIG_STRICT=0"), "{text}");
}

#[test]
fn broken_json() {
    assert_eq!(
        report("{\n  \"train_batch_size\": 8\n  \"fp16\": {\"enabled\": true}\n}"),
        "\
a comma is missing between two values [config::syntax]
 --> ds_config.json:2:24
  |
2 |   \"train_batch_size\": 8
  |                        ^ expected `,`
  |
3 |   \"fp16\": {\"enabled\": true}
  |   ^ before this"
    );
    assert_eq!(
        report("{\n  \"fp16\": {\"enabled\": True}\n}"),
        "\
`True` is not a JSON value [config::syntax]
 --> ds_config.json:2:23
  |
2 |   \"fp16\": {\"enabled\": True}
  |                       ^^^^ not a value without quotes
  = hint: write true"
    );
    let text = report("{\n  \"fp16\": {\n    \"enabled\": true\n");
    assert!(text.starts_with("the document ends and this bracket has no `}`"), "{text}");
    assert!(text.contains("--> ds_config.json:2:11"), "{text}");
    assert!(report("").contains("the document is empty"));
    assert!(report("{'a': 1}").contains("single quotes"));
    assert!(report("{stage: 1}").contains("write \"stage\""));
    assert!(report("{\"a\": .5}").contains("write 0.5"));
    assert!(report("{\"a\": 500_000}").contains("write 500000"));
    assert!(report("{\"a\": }").contains("expected a value"));
    assert!(report("{\"a\" 1}").contains("expected `:`"));
    assert!(report("{\"a\": \"b\n\"}").contains("no closing quote"));
    assert!(report("{\"a\": 1} }").contains("more text after the end"));
    assert!(report("[1, 2]").contains("a config is a block, not a list"));
    assert!(report("{\"a\": /* never closed\n1}").contains("comment is never closed"));
}

#[test]
fn a_wrong_type() {
    assert_eq!(
        report("{\"gradient_clipping\": \"1.0\"}"),
        "\
`gradient_clipping` cannot be text [config::wrong_type]
 --> ds_config.json:1:23 (gradient_clipping)
  |
1 | {\"gradient_clipping\": \"1.0\"}
  |                       ^^^^^ this is text
  = allowed: a number, 0 or more
  = hint: write 1.0 without quotes"
    );
    assert!(report("{\"fp16\": {\"enabled\": 1}}").contains("hint: write true"));
    assert!(report("{\"fp16\": true}").contains("allowed: a block in { }"));
    assert!(report("{\"train_batch_size\": true}").contains("cannot be true or false"));
}

#[test]
fn out_of_range() {
    assert_eq!(
        report("{\"zero_optimization\": {\"stage\": 4}}"),
        "\
`zero_optimization.stage` cannot be 4 [config::out_of_range]
 --> ds_config.json:1:33 (zero_optimization.stage)
  |
1 | {\"zero_optimization\": {\"stage\": 4}}
  |                                 ^ out of range
  = allowed: a whole number from 0 to 3"
    );
    assert!(report("{\"train_batch_size\": 8.5}").contains("not a whole number"));
    assert!(report("{\"gradient_clipping\": -1}").contains("allowed: a number, 0 or more"));
    assert!(report("{\"gradient_clipping\": NaN}").contains("not a finite number"));
    assert!(report("{\"steps_per_print\": -Infinity}").contains("out of range"));
    let text = report("{\"checkpoint\": {\"tag_validation\": \"WRAN\"}}");
    assert!(text.contains("allowed: WARN, IGNORE, FAIL") && text.contains("did you mean `WARN`?"), "{text}");
    let text = report("{\"communication_data_type\": \"fp8\"}");
    assert!(text.contains("allowed: fp32, fp16, bf16"), "{text}");
    let betas = "{\"optimizer\": {\"type\": \"Adam\", \"params\": {\"betas\": [0.9, 1.5]}}}";
    assert!(report(betas).contains("allowed: a list of 2 numbers from 0 to below 1"));
}

#[test]
fn a_removed_key() {
    assert_eq!(
        report("{\"amp\": {\"enabled\": false}}"),
        "\
`amp` is no longer a setting; DeepSpeed 0.19.8 rejects it too [config::removed]
 --> ds_config.json:1:2 (amp)
  |
1 | {\"amp\": {\"enabled\": false}}
  |  ^^^^^ removed
  = hint: delete it: use a bf16 or fp16 block"
    );
    for key in [
        "nebula",
        "compression_training",
        "quantize_training",
        "sparse_gradients",
        "eigenvalue",
        "sparse_attention",
        "elasticity",
        "graph_harvesting",
        "curriculum_learning",
        "progressive_layer_drop",
    ] {
        assert_eq!(problems(&format!("{{\"{key}\": null}}")), [("config::removed", key.to_owned())]);
    }
    for key in ["mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"] {
        let found = problems(&format!("{{\"zero_optimization\": {{\"{key}\": 1}}}}"));
        assert_eq!(found, [("config::removed", format!("zero_optimization.{key}"))]);
    }
    let clipped = "{\"optimizer\": {\"type\": \"Adam\", \"params\": {\"max_grad_norm\": 1.0}}}";
    assert!(report(clipped).contains("set gradient_clipping at the top of the config"));
}

#[test]
fn both_precisions() {
    assert_eq!(
        report("{\n  \"fp16\": {\"enabled\": true},\n  \"bf16\": {\"enabled\": true}\n}"),
        "\
`fp16` and `bf16` are both enabled; a model trains in one of them [config::contradiction]
 --> ds_config.json:3:23 (bf16.enabled)
  |
3 |   \"bf16\": {\"enabled\": true}
  |                       ^^^^ bf16 is enabled here
  |
2 |   \"fp16\": {\"enabled\": true},
  |                       ^^^^ fp16 is enabled here
  = hint: set the `enabled` of one of them to false"
    );
    config("{\"fp16\": {\"enabled\": false}, \"bf16\": {\"enabled\": true}}");
}

#[test]
fn a_feature_that_is_not_built() {
    assert_eq!(
        report("{\n  \"hybrid_engine\": {\"enabled\": true, \"max_out_tokens\": 9}\n}"),
        "\
`hybrid_engine` asks for the hybrid engine, which is not built yet [config::not_built]
 --> ds_config.json:2:20 (hybrid_engine)
  |
2 |   \"hybrid_engine\": {\"enabled\": true, \"max_out_tokens\": 9}
  |                    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ not built yet
  = hint: set `hybrid_engine.enabled` to false, or delete the block"
    );
    for (text, path) in [
        (
            "{\"zero_optimization\": {\"stage\": 3, \"zero_quantized_weights\": true}}",
            "zero_optimization.zero_quantized_weights",
        ),
        (
            "{\"zero_optimization\": {\"stage\": 2, \"offload_optimizer\": {\"super_offload\": true}}}",
            "zero_optimization.offload_optimizer.super_offload",
        ),
        ("{\"autotuning\": {\"enabled\": true, \"fast\": false}}", "autotuning"),
        ("{\"tensor_parallel\": {\"autotp_size\": 2}}", "tensor_parallel.autotp_size"),
        ("{\"sequence_parallel_size\": 2}", "sequence_parallel_size"),
        ("{\"gradient_allreduce_op\": \"sum\"}", "gradient_allreduce_op"),
        ("{\"bf16\": {\"enabled\": true, \"bf16_optimizer_states\": true}}", "bf16.bf16_optimizer_states"),
        ("{\"optimizer\": {\"type\": \"Muon\"}}", "optimizer.type"),
    ] {
        assert_eq!(problems(text), [("config::not_built", path.to_owned())], "{text}");
    }
}

#[test]
fn features_that_are_off_are_accepted() {
    for text in [
        "{\"tensorboard\": {\"enabled\": false, \"output_path\": \"logs\"}}",
        "{\"zero_optimization\": {\"stage\": 2, \"offload_optimizer\": {\"device\": \"none\", \"nvme_path\": null}}}",
        "{\"zero_optimization\": {\"stage\": 2, \"offload_param\": null, \"cpu_offload\": false}}",
        "{\"zero_optimization\": {\"stage\": 2, \"stage3_max_live_parameters\": 1e9, \"stage3_prefetch_bucket_size\": \"auto\"}}",
        "{\"activation_checkpointing\": {\"partition_activations\": false, \"number_checkpoints\": null}}",
        "{\"autotuning\": {\"enabled\": false}}",
        "{\"sequence_parallel_size\": 1, \"gradient_allreduce_op\": \"mean\"}",
        "{\"aio\": {\"block_size\": 262144, \"thread_count\": 1}}",
        "{\"pipeline\": {\"stages\": \"auto\"}}",
    ] {
        config(text);
    }
}

#[test]
fn every_problem_is_reported_in_the_order_of_the_text() {
    let text = "{\"train_batch_sise\": 8, \"amp\": {}, \"fp16\": {\"enabled\": \"yes\", \"hysteresis\": 0},
        \"zero_optimization\": {\"zero_quantized_weights\": true}, \"zero_optimization\": {\"stage\": 9}}";
    let codes: Vec<&str> = problems(text).into_iter().map(|(code, _)| code).collect();
    assert_eq!(
        codes,
        [
            "config::unknown_key",
            "config::removed",
            "config::wrong_type",
            "config::out_of_range",
            "config::not_built",
            "config::duplicate_key",
            "config::out_of_range"
        ]
    );
    assert!(report(text).starts_with("ds_config.json has 7 problems\n\n"));
}

#[test]
fn auto_names_who_fills_it_in() {
    assert_eq!(
        report("{\"train_batch_size\": \"auto\"}"),
        "\
`train_batch_size` is still \"auto\" [config::unfilled_auto]
 --> ds_config.json:1:22 (train_batch_size)
  |
1 | {\"train_batch_size\": \"auto\"}
  |                      ^^^^^^ nothing has filled this in
  = hint: the Hugging Face Trainer or accelerate fills it in before the engine starts; without it, write a value"
    );
    assert_eq!(config("{\"gradient_clipping\": \"auto\"}").gradient_clipping, 1.0);
    let lr = "{\"optimizer\": {\"type\": \"AdamW\", \"params\": {\"lr\": \"auto\"}}}";
    assert_eq!(problems(lr), [("config::unfilled_auto", "optimizer.params.lr".to_owned())]);
    let template = Options { allow_auto: true, ..Options::default() };
    assert!(Config::from_text(lr, Origin::Dict, &template).is_ok());
}

#[test]
fn unknown_settings_are_warnings_when_not_strict() {
    let lax = Options::from_strict_variable(Some("0"));
    assert!(!lax.strict && Options::from_strict_variable(None).strict);
    let resolved = Config::from_text("{\"gradient_clipp1ng\": 1}", Origin::Dict, &lax).unwrap();
    assert_eq!(resolved.warnings.len(), 1);
    assert!(resolved.warnings[0].to_string().contains("did you mean `gradient_clipping`?"));
}

#[test]
fn keys_of_other_libraries_are_warnings() {
    let resolved =
        resolve("{\"msamp\": {\"enabled\": true}, \"_comment\": \"mine\", \"hf_seed\": 1}").unwrap();
    let codes: Vec<&str> = resolved.warnings.iter().map(|warning| warning.code.as_str()).collect();
    assert_eq!(codes, ["config::foreign_key"; 3]);
}

#[test]
fn a_dict_is_named_without_lines() {
    let text = "{\"train_batch_size\": 8, \"zero_optimization\": {\"stage\": 7}}";
    let error = Config::from_text(text, Origin::Dict, &Options::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "\
`zero_optimization.stage` cannot be 7 [config::out_of_range]
 --> the config dict (zero_optimization.stage)
  |
  | {\"train_batch_size\": 8, \"zero_optimization\": {\"stage\": 7}}
  |                                                        ^ out of range
  = allowed: a whole number from 0 to 3"
    );
}

#[test]
fn long_lines_are_cut_around_the_place() {
    let filler = "x".repeat(300);
    let text = format!("{{\"_a\": \"{filler}\", \"stage_\": 1, \"_b\": \"{filler}\"}}");
    let shown = report(&text);
    assert!(shown.lines().all(|line| line.chars().count() < 140), "{shown}");
    assert!(shown.contains("\"stage_\": 1"), "{shown}");
}

#[test]
fn schedules_say_what_they_need() {
    let found =
        problems("{\"scheduler\": {\"type\": \"WarmupDecayLR\", \"params\": {\"warmup_num_steps\": 10}}}");
    assert_eq!(found, [("config::missing", "scheduler.params.total_num_steps".to_owned())]);
    let found = problems("{\"scheduler\": {\"type\": \"WarmupLR\", \"params\": {\"warmup_num_steps\": 0}}}");
    assert_eq!(found, [("config::out_of_range", "scheduler.params.warmup_num_steps".to_owned())]);
    assert_eq!(
        problems("{\"optimizer\": {\"params\": {}}}"),
        [("config::missing", "optimizer.type".to_owned())]
    );
}

#[test]
fn doubtful_names_are_warnings() {
    let resolved = resolve("{\"optimizer\": {\"type\": \"Adamm\"}}").unwrap();
    assert!(resolved.warnings[0].to_string().contains("did you mean `Adam`?"));
    assert!(
        resolve("{\"optimizer\": {\"type\": \"RMSprop\", \"params\": {\"alpha\": 0.9}}}")
            .unwrap()
            .warnings
            .is_empty()
    );
}
