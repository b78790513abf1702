//! Parameters of optimizers and schedules that are wrong together, or that torch would refuse later.

use deepspeed_config::{Config, Options, Origin};

use crate::{problems, report, resolve};

fn optimizer(kind: &str, params: &str) -> String {
    format!("{{\"optimizer\": {{\"type\": \"{kind}\", \"params\": {{{params}}}}}}}")
}

fn scheduler(kind: &str, params: &str) -> String {
    format!("{{\"scheduler\": {{\"type\": \"{kind}\", \"params\": {{{params}}}}}}}")
}

#[test]
fn nesterov_without_momentum() {
    assert_eq!(
        report(
            "{\n  \"optimizer\": {\n    \"type\": \"sgd\",\n    \"params\": {\"nesterov\": true, \"momentum\": 0}\n  }\n}"
        ),
        "\
SGD: `nesterov` needs a `momentum` above 0 and a `dampening` of 0 [config::contradiction]
 --> ds_config.json:4:28 (optimizer.params.nesterov)
  |
4 |     \"params\": {\"nesterov\": true, \"momentum\": 0}
  |                            ^^^^ on here
  |
4 |     \"params\": {\"nesterov\": true, \"momentum\": 0}
  |                                              ^ no momentum"
    );
    for params in [
        "\"nesterov\": true",
        "\"nesterov\": true, \"momentum\": 0.9, \"dampening\": 0.1",
        "\"nesterov\": true, \"momentum\": null",
    ] {
        let found = problems(&optimizer("SGD", params));
        assert_eq!(found, [("config::contradiction", "optimizer.params.nesterov".to_owned())], "{params}");
    }
    for params in [
        "\"nesterov\": true, \"momentum\": 0.9",
        "\"nesterov\": false",
        "\"momentum\": 0.9, \"dampening\": 0.1",
    ] {
        assert!(resolve(&optimizer("SGD", params)).is_ok(), "{params}");
    }
    // Who fills in the momentum may make it right.
    let template = Options { allow_auto: true, ..Options::default() };
    let text = optimizer("SGD", "\"nesterov\": true, \"momentum\": \"auto\"");
    assert!(Config::from_text(&text, Origin::Dict, &template).is_ok());
}

#[test]
fn adamw_that_is_none() {
    for key in ["adam_w_mode", "adamw_mode"] {
        let text = report(&optimizer("AdamW", &format!("\"{key}\": false")));
        assert!(text.contains("contradicts the name; use the type `Adam` for L2 regularisation"), "{text}");
        assert!(resolve(&optimizer("Adam", &format!("\"{key}\": false"))).is_ok());
    }
    assert!(resolve(&optimizer("AdamW", "\"adam_w_mode\": true")).is_ok());
}

#[test]
fn limits_of_lamb_the_wrong_way_round() {
    for params in ["\"min_coeff\": 11", "\"max_coeff\": 0.001", "\"min_coeff\": 2, \"max_coeff\": 1"] {
        let text = report(&optimizer("Lamb", params));
        assert!(
            text.starts_with("Lamb: `min_coeff` is larger than `max_coeff` [config::contradiction]"),
            "{text}"
        );
    }
    assert!(resolve(&optimizer("Lamb", "\"min_coeff\": 0.1")).is_ok());
}

#[test]
fn values_that_no_optimizer_takes() {
    for kind in ["Adam", "AdamW", "Lamb", "RMSprop", "NAdam"] {
        for (key, value) in [("lr", "-1e-3"), ("eps", "-1e-8"), ("weight_decay", "-0.1")] {
            let found = problems(&optimizer(kind, &format!("\"{key}\": {value}")));
            assert_eq!(found, [("config::out_of_range", format!("optimizer.params.{key}"))], "{kind} {key}");
        }
    }
    for kind in ["Adam", "Lion", "NAdam"] {
        for betas in ["[0.9, 1.0]", "[-0.1, 0.9]", "[0.9]"] {
            let found = problems(&optimizer(kind, &format!("\"betas\": {betas}")));
            assert_eq!(
                found,
                [("config::out_of_range", "optimizer.params.betas".to_owned())],
                "{kind} {betas}"
            );
        }
    }
    // Adafactor's epsilon is a pair.
    assert!(resolve(&optimizer("Adafactor", "\"eps\": [null, 1e-3], \"lr\": 0.01")).is_ok());
    let found = problems(&optimizer("Adagrad", "\"initial_accumulator_value\": 0.1"));
    assert_eq!(found, [("config::not_built", "optimizer.params.initial_accumulator_value".to_owned())]);
}

#[test]
fn a_training_shorter_than_its_warm_up() {
    // The schedule is defined all the same, so it is doubtful, not wrong.
    let short = scheduler("WarmupDecayLR", "\"total_num_steps\": 50, \"warmup_num_steps\": 100");
    assert_eq!(
        resolve(&short).unwrap().warnings[0].to_string(),
        "\
WarmupDecayLR: the training of 50 steps (`total_num_steps`) is over before its warm-up of 100 steps (`warmup_num_steps`) \
is [config::doubtful]
 --> ds_config.json:1:71 (scheduler.params.total_num_steps)
  |
1 | {\"scheduler\": {\"type\": \"WarmupDecayLR\", \"params\": {\"total_num_steps\": 50, \"warmup_num_steps\": 100}}}
  |                                                                       ^^ all steps
  |
1 | {\"scheduler\": {\"type\": \"WarmupDecayLR\", \"params\": {\"total_num_steps\": 50, \"warmup_num_steps\": 100}}}
  |                                                                                               ^^^ the warm-up
  = hint: set `warmup_num_steps` below `total_num_steps`"
    );
    let resolved = resolve(&scheduler("WarmupDecayLR", "\"total_num_steps\": 100")).unwrap();
    assert!(resolved.warnings[0].to_string().contains("`warmup_num_steps`, by default"));
    let fits = scheduler("WarmupDecayLR", "\"total_num_steps\": 100, \"warmup_num_steps\": 99");
    assert!(resolve(&fits).unwrap().warnings.is_empty());
}

#[test]
fn rates_of_schedules() {
    for (kind, key) in [
        ("WarmupLR", "warmup_min_lr"),
        ("WarmupLR", "warmup_max_lr"),
        ("LRRangeTest", "lr_range_test_min_lr"),
    ] {
        for value in ["-1e-3", "[1e-3, -1e-3]"] {
            let found = problems(&scheduler(kind, &format!("\"{key}\": {value}")));
            assert_eq!(found, [("config::out_of_range", format!("scheduler.params.{key}"))], "{key} {value}");
        }
        assert!(resolve(&scheduler(kind, &format!("\"{key}\": [1e-3, 0]"))).is_ok());
    }
    let crossed = scheduler("OneCycle", "\"cycle_min_lr\": 0.1, \"cycle_max_lr\": [0.2, 0.05]");
    let resolved = resolve(&crossed).unwrap();
    assert!(resolved.warnings[0].to_string().contains("`cycle_min_lr` is larger than `cycle_max_lr`"));
    let uneven = scheduler("WarmupLR", "\"warmup_min_lr\": [0, 0], \"warmup_max_lr\": [1, 1, 1]");
    assert_eq!(problems(&uneven), [("config::contradiction", "scheduler.params.warmup_min_lr".to_owned())]);
    let text = report(&uneven);
    assert!(text.contains("`warmup_min_lr` lists 2 values and `warmup_max_lr` 3"), "{text}");
}
