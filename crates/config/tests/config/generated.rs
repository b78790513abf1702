//! What is generated from the table.

use std::path::Path;

use deepspeed_config::{Origin, explain, json_schema, parse, reference, table};

#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/config-reference.md");
    let page = fs_err::read_to_string(path).unwrap_or_default();
    assert!(
        page == reference::markdown(),
        "docs/config-reference.md is stale; run: {}",
        reference::REGENERATE
    );
}

#[test]
fn the_schema_knows_every_setting_but_the_removed() {
    let schema = json_schema();
    for setting in table::settings() {
        let removed = matches!(setting.status, table::Status::Removed { .. });
        let mut place = &schema;
        for key in setting.path.split('.') {
            let block = place["anyOf"]
                .as_array()
                .and_then(|choices| choices.iter().find(|choice| choice.get("properties").is_some()))
                .and_then(|choice| {
                    // A truth value or a block: one level deeper.
                    Some(choice).filter(|choice| choice["properties"].is_object())
                })
                .unwrap_or_else(|| {
                    place["anyOf"][0]["anyOf"]
                        .as_array()
                        .and_then(|choices| choices.iter().find(|choice| choice.get("properties").is_some()))
                        .unwrap_or(place)
                });
            place = &block["properties"][key];
        }
        assert_eq!(place.is_null(), removed, "{}", setting.path);
    }
}

#[test]
fn explain_says_what_each_setting_does() {
    let text = "{\n  \"train_batch_size\": \"auto\",\n  \"zero_optimization\": {\"stage\": 2, \"overlap_comm\": true},\n  \
                \"optimizer\": {\"type\": \"Lion\", \"params\": {\"lr\": 1e-4}},\n  \"mystery\": 1\n}";
    let document = parse(text, Origin::File("ds_config.json".into())).unwrap();
    let out = explain::explain(&document);
    assert!(out.contains("zero_optimization.stage = 2 (line 3)\n    What is sharded:"), "{out}");
    assert!(out.contains("accepted without effect:"), "{out}");
    assert!(
        out.contains("optimizer.params.lr = 1e-4 (line 4)\n    The learning rate.\n    default 0.001"),
        "{out}"
    );
    assert!(out.contains("\"auto\" is filled in by the Hugging Face Trainer or accelerate"), "{out}");
    assert!(out.contains("mystery = 1 (line 5)\n    no setting of ours has this name"), "{out}");

    let one = explain::explain_key(&document, "stage").unwrap();
    assert!(one.contains("takes    a whole number from 0 to 3") && one.contains("set to   2"), "{one}");
    let one = explain::explain_key(&document, "gradient_clipping").unwrap();
    assert!(one.contains("not set in ds_config.json"), "{one}");
    let error = explain::explain_key(&document, "gradient_clippin").unwrap_err();
    assert!(error.contains("did you mean `gradient_clipping`?"), "{error}");
    let error = explain::explain_key(&document, "enabled").unwrap_err();
    assert!(error.contains("fp16.enabled"), "{error}");
}
