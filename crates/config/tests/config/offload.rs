//! `offload_optimizer`, `offload_param` and their old forms.

use std::path::PathBuf;

use deepspeed_config::{OffloadDevice, OffloadOptimizerConfig, OffloadParamConfig};

use crate::{config, problems, report, resolve};

#[test]
fn the_defaults() {
    let zero = config("{\"train_batch_size\": 1}").zero;
    let expected = OffloadOptimizerConfig {
        device: OffloadDevice::None,
        nvme_path: None,
        buffer_count: 4,
        pin_memory: true,
        pipeline_read: false,
        pipeline_write: false,
        fast_init: false,
        ratio: 1.0,
    };
    assert_eq!(zero.offload_optimizer, expected);
    assert_eq!(zero.offload_optimizer, OffloadOptimizerConfig::default());
    let expected = OffloadParamConfig {
        device: OffloadDevice::None,
        nvme_path: None,
        buffer_count: 5,
        buffer_size: 100_000_000,
        max_in_cpu: 1_000_000_000,
        pin_memory: true,
    };
    assert_eq!(zero.offload_param, expected);
    assert_eq!(zero.offload_param, OffloadParamConfig::default());
}

#[test]
fn every_key_is_read() {
    let zero = config(
        r#"{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "NVMe", "nvme_path": "/disk/a",
            "buffer_count": 6, "pin_memory": false, "pipeline_read": true, "pipeline_write": true,
            "fast_init": true, "ratio": 0.25}}}"#,
    )
    .zero;
    let expected = OffloadOptimizerConfig {
        device: OffloadDevice::Nvme,
        nvme_path: Some(PathBuf::from("/disk/a")),
        buffer_count: 6,
        pin_memory: false,
        pipeline_read: true,
        pipeline_write: true,
        fast_init: true,
        ratio: 0.25,
    };
    assert_eq!(zero.offload_optimizer, expected);
}

#[test]
fn a_device_that_has_nothing_to_move() {
    let text = "{\"zero_optimization\": {\"stage\": 2, \"offload_param\": {\"device\": \"cpu\"}}}";
    assert_eq!(
        problems(text),
        [("config::contradiction", "zero_optimization.offload_param.device".to_owned())]
    );
    let report = report(text);
    assert!(report.contains("set `zero_optimization.stage` to 3 or more"), "{report}");
    assert_eq!(
        problems("{\"zero_optimization\": {\"offload_optimizer\": {\"device\": \"cpu\"}}}"),
        [("config::contradiction", "zero_optimization.offload_optimizer.device".to_owned())]
    );
    assert_eq!(
        problems("{\"zero_optimization\": {\"stage\": 2, \"cpu_offload_param\": true}}"),
        [("config::contradiction", "zero_optimization.cpu_offload_param".to_owned())]
    );
}

#[test]
fn nvme_needs_a_folder() {
    for path in ["", ", \"nvme_path\": null", ", \"nvme_path\": \" \""] {
        let text = format!(
            "{{\"zero_optimization\": {{\"stage\": 1, \"offload_optimizer\": {{\"device\": \"nvme\"{path}}}}}}}"
        );
        assert_eq!(
            problems(&text),
            [("config::missing", "zero_optimization.offload_optimizer.nvme_path".to_owned())],
            "{text}"
        );
    }
}

#[test]
fn the_old_forms() {
    let text = "{\"zero_optimization\": {\"stage\": 2, \"cpu_offload\": true, \"cpu_offload_use_pin_memory\": false}}";
    let resolved = resolve(text).unwrap();
    let offload = &resolved.config.zero.offload_optimizer;
    assert_eq!((offload.device, offload.pin_memory), (OffloadDevice::Cpu, false));
    let warnings: Vec<&str> = resolved.warnings.iter().map(|warning| warning.code.as_str()).collect();
    assert_eq!(warnings, ["config::deprecated"]);
    let both = "{\"zero_optimization\": {\"stage\": 2, \"cpu_offload\": true, \
                \"offload_optimizer\": {\"device\": \"nvme\", \"nvme_path\": \"x\"}}}";
    assert_eq!(problems(both), [("config::contradiction", "zero_optimization.cpu_offload".to_owned())]);
}
