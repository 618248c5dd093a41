//! Descriptions of machines, in TOML and JSON.

use kiln_vmm::VmConfig;

/// Reads these bytes as TOML and as JSON. What was understood is written and read again.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Err(error) = VmConfig::from_toml(text) {
        error.to_string();
    }
    match VmConfig::from_json(text) {
        Ok(config) => {
            let text = serde_json::to_string(&config).unwrap();
            let again = VmConfig::from_json(&text).unwrap();
            assert_eq!(format!("{config:?}"), format!("{again:?}"));
        }
        Err(error) => drop(error.to_string()),
    }
}
