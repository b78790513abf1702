//! The scanner against serde_json, and against nonsense.

use deepspeed_config::{Config, Options, Origin, json, parse};
use proptest::prelude::*;

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        any::<u64>().prop_map(serde_json::Value::from),
        any::<f64>().prop_filter("finite", |x| x.is_finite()).prop_map(serde_json::Value::from),
        any::<String>().prop_map(serde_json::Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(serde_json::Value::from),
            proptest::collection::btree_map(any::<String>(), inner, 0..6)
                .prop_map(|members| members.into_iter().collect()),
        ]
    })
}

/// Text that is nearly JSON, or a nearly right config.
fn near_json() -> impl Strategy<Value = String> {
    let token = prop_oneof![
        Just("{".to_owned()),
        Just("}".to_owned()),
        Just("[".to_owned()),
        Just("]".to_owned()),
        Just(",".to_owned()),
        Just(":".to_owned()),
        Just("\"".to_owned()),
        Just("\\".to_owned()),
        Just("//".to_owned()),
        Just("/*".to_owned()),
        Just("*/".to_owned()),
        Just("#".to_owned()),
        Just("\n".to_owned()),
        Just("null".to_owned()),
        Just("true".to_owned()),
        Just("-".to_owned()),
        Just("1e5".to_owned()),
        Just("-Infinity".to_owned()),
        Just("NaN".to_owned()),
        Just("'".to_owned()),
        Just("\"zero_optimization\"".to_owned()),
        Just("\"stage\"".to_owned()),
        Just("\"fp16\"".to_owned()),
        Just("\"auto\"".to_owned()),
        Just("\\ud800".to_owned()),
        "\\PC{0,3}",
    ];
    proptest::collection::vec(token, 0..30).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn valid_json_reads_as_serde_json_reads_it(value in any_json(), pretty in any::<bool>()) {
        let text = if pretty { format!("{value:#}") } else { value.to_string() };
        let ours = json::parse(&text).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
        let theirs: serde_json::Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(ours.to_json(), theirs);
    }

    #[test]
    fn whatever_serde_json_accepts_is_accepted_and_means_the_same(text in near_json()) {
        if let Ok(theirs) = serde_json::from_str::<serde_json::Value>(&text) {
            let ours = json::parse(&text).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            prop_assert_eq!(ours.to_json(), theirs);
        }
    }

    #[test]
    fn numbers_are_accepted_exactly_where_serde_json_accepts_them(text in "-?[0-9]{0,3}(\\.[0-9]{0,2})?([eE][+-]?[0-9]{0,3})?") {
        let theirs = serde_json::from_str::<serde_json::Value>(&text).ok();
        prop_assert_eq!(json::parse(&text).ok().map(|node| node.to_json()), theirs);
    }

    #[test]
    fn spans_cover_what_they_stand_for(value in any_json()) {
        let text = format!("{value:#}");
        let mut nodes = vec![json::parse(&text).map_err(|error| TestCaseError::fail(format!("{error:?}")))?];
        while let Some(node) = nodes.pop() {
            let again = json::parse(&text[node.span.clone()]);
            prop_assert_eq!(again.map(|again| again.to_json()).ok(), Some(node.to_json()));
            match node.value {
                json::Value::List(items) => nodes.extend(items),
                json::Value::Object(members) => for member in members {
                    prop_assert_eq!(
                        serde_json::from_str::<String>(&text[member.key_span.clone()]).ok(), Some(member.key.clone())
                    );
                    nodes.push(member.value);
                },
                _ => {}
            }
        }
    }

    #[test]
    fn nonsense_gives_an_error_that_prints(text in any::<String>()) {
        if let Err(error) = Config::from_text(&text, Origin::File("c.json".into()), &Options::default()) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn near_configs_never_panic(text in near_json()) {
        for text in [text.clone(), format!("{{{text}}}"), format!("{{\"fp16\": {text}}}")] {
            match Config::from_text(&text, Origin::File("c.json".into()), &Options::default()) {
                Ok(resolved) => { let _ = resolved.config.resolve_batch(2, "").map_err(|error| error.to_string()); }
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn any_value_under_any_setting_is_judged(
        index in any::<prop::sample::Index>(),
        value in any_json(),
    ) {
        let settings: Vec<_> = deepspeed_config::table::settings().collect();
        let path = settings[index.index(settings.len())].path;
        let text = path.rsplit('.').fold(value.to_string(), |inner, key| format!("{{\"{key}\": {inner}}}"));
        match Config::from_text(&text, Origin::Dict, &Options::default()) {
            Ok(resolved) => { let _ = resolved.config.resolve_batch(2, "").map_err(|error| error.to_string()); }
            Err(error) => prop_assert!(error.to_string().contains("-->")),
        }
    }
}

#[test]
fn depth_is_limited() {
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    assert!(json::parse(&nested(json::MAX_DEPTH)).is_ok());
    assert!(serde_json::from_str::<serde_json::Value>(&nested(json::MAX_DEPTH)).is_ok());
    assert!(serde_json::from_str::<serde_json::Value>(&nested(json::MAX_DEPTH + 1)).is_err());
    for text in [nested(json::MAX_DEPTH + 1), "[".repeat(1_000_000), "{\"a\":".repeat(1_000_000)] {
        let error = parse(&text, Origin::Dict).unwrap_err().to_string();
        assert!(error.contains("nest more than 127 deep"), "{error}");
    }
}
