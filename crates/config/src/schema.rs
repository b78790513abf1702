//! The table as a JSON Schema, for editors that complete and check while one types.

use serde_json::{Map, Value as Json, json};

use crate::table::{self, AutoRule, Kind, Named, Setting, Status};

/// The JSON Schema (draft 2020-12) of ds_config.json.
pub fn json_schema() -> Json {
    let mut schema = block("");
    let members = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ds_config.json",
        "description": "The configuration of a DeepSpeed run.",
        "patternProperties": { "^(_|hf_|x_|//)": true },
    });
    if let (Json::Object(schema), Json::Object(members)) = (&mut schema, members) {
        for (index, (key, value)) in members.into_iter().enumerate() {
            schema.shift_insert(index, key, value);
        }
        if let Some(Json::Object(properties)) = schema.get_mut("properties") {
            for key in table::FOREIGN_KEYS {
                properties.insert((*key).to_owned(), Json::Bool(true));
            }
        }
    }
    schema
}

/// A block of the table.
fn block(path: &str) -> Json {
    let properties: Map<String, Json> = table::children(path)
        .filter(|setting| !matches!(setting.status, Status::Removed { .. }))
        .flat_map(|setting| {
            std::iter::once(setting.key())
                .chain(setting.aliases.iter().copied())
                .map(|name| (name.to_owned(), property(setting)))
        })
        .collect();
    let mut schema = json!({ "type": "object", "properties": properties, "additionalProperties": false });
    let entries = match path {
        "optimizer" => table::OPTIMIZERS,
        "scheduler" => table::SCHEDULERS,
        _ => return schema,
    };
    schema["allOf"] = entries.iter().map(params_of).collect();
    schema["required"] = json!(["type"]);
    schema
}

/// What the params of one named optimizer or schedule are.
fn params_of(entry: &Named) -> Json {
    let properties: Map<String, Json> = entry
        .params
        .iter()
        .filter(|setting| !matches!(setting.status, Status::Removed { .. }))
        .flat_map(|setting| {
            std::iter::once(setting.key())
                .chain(setting.aliases.iter().copied())
                .map(|name| (name.to_owned(), property(setting)))
        })
        .collect();
    json!({
        "if": { "properties": { "type": { "enum": [entry.name, entry.name.to_ascii_lowercase()] } } },
        "then": { "properties": { "params": {
            "type": ["object", "null"], "properties": properties, "additionalProperties": false
        } } },
    })
}

fn property(setting: &Setting) -> Json {
    let mut choices = vec![of_kind(setting)];
    if setting.auto != AutoRule::NotAllowed
        && !matches!(setting.kind, Kind::Block | Kind::BoolOrBlock | Kind::Open | Kind::Text | Kind::Anything)
    {
        choices.push(json!({ "const": "auto" }));
    }
    if setting.kind != Kind::Anything {
        choices.push(json!({ "type": "null" }));
    }
    let mut schema = if choices.len() == 1 { choices.remove(0) } else { json!({ "anyOf": choices }) };
    let mut description = setting.meaning.to_owned();
    match setting.status {
        Status::NotBuilt { .. } => description.push_str(" Not built yet."),
        Status::NoEffect { why } => description.push_str(&format!(" No effect: {why}.")),
        _ => {}
    }
    schema["description"] = Json::from(description);
    if setting.default != "null"
        && let Ok(node) = crate::json::parse(setting.default)
    {
        schema["default"] = node.to_json();
    }
    schema
}

fn of_kind(setting: &Setting) -> Json {
    match setting.kind {
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Int { min, max: i64::MAX } => json!({ "type": "integer", "minimum": min }),
        Kind::Int { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::IntOrInfinity => json!({ "type": "integer", "minimum": 1 }),
        Kind::Float { min, max, above } => {
            let mut schema = json!({ "type": "number" });
            if min.is_finite() {
                schema[if above { "exclusiveMinimum" } else { "minimum" }] = Json::from(min);
            }
            if max.is_finite() {
                schema["maximum"] = Json::from(max);
            }
            schema
        }
        Kind::Fractions(count) => json!({
            "type": "array", "minItems": count, "maxItems": count,
            "items": { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }
        }),
        Kind::Numbers => json!({
            "anyOf": [{ "type": "number" }, { "type": "array", "items": { "type": "number" } }]
        }),
        Kind::Rates => json!({
            "anyOf": [
                { "type": "number", "minimum": 0 },
                { "type": "array", "items": { "type": "number", "minimum": 0 } }
            ]
        }),
        Kind::Text => json!({ "type": "string" }),
        // Both cases, as far as an enumeration can say it.
        Kind::Choice(words) => {
            let lower = words.iter().map(|word| word.to_ascii_lowercase());
            let upper = words.iter().map(|word| word.to_ascii_uppercase());
            let mut all: Vec<String> =
                words.iter().map(|word| (*word).to_owned()).chain(lower).chain(upper).collect();
            let mut seen = std::collections::HashSet::new();
            all.retain(|word| seen.insert(word.clone()));
            json!({ "enum": all })
        }
        Kind::DType => json!({
            "enum": ["fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half",
                     "torch.float32", "torch.float16", "torch.bfloat16"]
        }),
        Kind::List => json!({ "type": "array" }),
        Kind::Block => block(setting.path),
        Kind::BoolOrBlock => json!({ "anyOf": [{ "type": "boolean" }, block(setting.path)] }),
        Kind::Open => json!({ "type": "object" }),
        Kind::Anything => json!({}),
    }
}
