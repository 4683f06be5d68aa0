//! What a VM's file may hold, for editors: a JSON schema.

use clap::{Arg, ArgAction, Args as _, Command};
use serde_json::{Map, Value, json};

use super::{key, keys};
use crate::run;

/// The schema, made from the options of `ballast run`.
pub fn schema() -> Value {
    let command = run::Args::augment_args(Command::new("run"));
    let properties: Map<String, Value> =
        keys(&command).filter_map(|arg| Some((key(arg)?, property(arg)))).collect();
    let required: Vec<String> = keys(&command).filter(|arg| arg.is_required_set()).filter_map(key).collect();
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A VM of ballast run --config",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    });
    // The command line may have what the file lacks; editors should know what a VM can't do without.
    if let (false, Some(schema)) = (required.is_empty(), schema.as_object_mut()) {
        schema.insert("required".to_owned(), json!(required));
    }
    schema
}

fn property(arg: &Arg) -> Value {
    let values: Vec<String> =
        arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    let scalar =
        if values.is_empty() { json!({ "type": ["string", "number"] }) } else { json!({ "enum": values }) };
    let mut property = match arg.get_action() {
        ArgAction::SetTrue => json!({ "type": "boolean", "default": false }),
        ArgAction::Append => json!({ "anyOf": [scalar.clone(), { "type": "array", "items": scalar }] }),
        _ => scalar,
    };
    if let Some(property) = property.as_object_mut() {
        if let Some(help) = arg.get_long_help().or_else(|| arg.get_help()) {
            property.insert("description".to_owned(), json!(help.to_string()));
        }
        if let ([default], ArgAction::Set) = (arg.get_default_values(), arg.get_action()) {
            property.insert("default".to_owned(), json!(default.to_string_lossy()));
        }
    }
    property
}
