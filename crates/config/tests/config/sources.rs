use base64::Engine as _;
use deepspeed_config::{Code, Config, Options, Origin, load, parse};

#[test]
fn a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ds_config.json");
    fs_err::write(&path, "\u{feff}{\"train_batch_size\": 8}\r\n").unwrap();
    let document = load(path.to_str().unwrap()).unwrap();
    assert_eq!(document.origin(), &Origin::File(path));
    assert_eq!(document.json(), serde_json::json!({"train_batch_size": 8}));
}

#[test]
fn base64_of_both_alphabets_padded_or_not() {
    let text = "{\"train_batch_size\": 8, \"_note\": \"\u{fbff}?>\u{3fff}\u{fffd}\"}";
    for engine in [
        base64::engine::general_purpose::STANDARD,
        base64::engine::general_purpose::STANDARD_NO_PAD,
        base64::engine::general_purpose::URL_SAFE,
        base64::engine::general_purpose::URL_SAFE_NO_PAD,
    ] {
        let document = load(&engine.encode(text)).unwrap();
        assert_eq!(document.origin(), &Origin::Base64);
        assert_eq!(document.text(), text);
    }
    let wrong = base64::engine::general_purpose::URL_SAFE.encode("{\"zero_optimization\": {\"stage\": 8}}");
    let error = Config::load(&wrong, &Options::default()).unwrap_err().to_string();
    assert!(error.contains("--> the base64 config (zero_optimization.stage)"), "{error}");
}

#[test]
fn neither_a_file_nor_base64() {
    let folder = tempfile::tempdir().unwrap();
    fs_err::write(folder.path().join("ds_config.json"), "{}").unwrap();
    let wrong = folder.path().join("ds_confg.json");
    let error = load(wrong.to_str().unwrap()).unwrap_err();
    assert_eq!(error.diagnostics()[0].code, Code::Unreadable);
    let text = error.to_string();
    assert!(text.contains("is neither an existing file nor base64 of JSON"), "{text}");
    assert!(text.contains("ds_config.json`?"), "{text}");

    let error = load("").unwrap_err().to_string();
    assert!(error.contains("is neither an existing file"), "{error}");
    let error = load(&"a".repeat(100_000)).unwrap_err().to_string();
    assert!(error.len() < 1000, "{error}");
    let error = load(folder.path().to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("is a directory"), "{error}");
    let error = load("{\"train_batch_size\": 8}").unwrap_err().to_string();
    assert!(error.contains("pass a dict"), "{error}");
}

#[test]
fn a_file_that_is_not_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ds_config.json");
    fs_err::write(&path, b"{\n\"a\": \"\xff\"}").unwrap();
    let error = load(path.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("ds_config.json:2: the config is not UTF-8 text"), "{error}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_without_end() {
    let error = load("/dev/zero").unwrap_err().to_string();
    assert!(error.contains("it is no config"), "{error}");
}

#[test]
fn a_named_text() {
    let error = parse("{", Origin::Text("--config".to_owned())).unwrap_err().to_string();
    assert!(error.contains("--> --config:1:1"), "{error}");
}
