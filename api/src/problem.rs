//! The body of every answer that is not what was asked for (RFC 9457).

use serde::{Deserialize, Serialize};

/// Its media type.
pub const CONTENT_TYPE: &str = "application/problem+json";

/// What was wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Always `about:blank`: the status says which kind it is.
    #[serde(rename = "type", default = "blank")]
    pub kind: String,
    /// The status in words.
    #[serde(default)]
    pub title: String,
    /// The HTTP status, 4xx or 5xx.
    pub status: u16,
    /// A sentence that says what was wrong, and what to do.
    pub detail: String,
}

fn blank() -> String {
    "about:blank".to_owned()
}

impl Problem {
    /// A problem of this `status`, which is called `title`.
    pub fn new(status: u16, title: &str, detail: impl Into<String>) -> Self {
        Self { kind: blank(), title: title.to_owned(), status, detail: detail.into() }
    }

    /// As JSON.
    pub fn to_json(&self) -> Vec<u8> {
        // Strings and a number can always be encoded; an empty body would still be valid HTTP.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What paths without a version have instead.
    pub fn to_unversioned_json(&self) -> Vec<u8> {
        serde_json::to_vec(&Unversioned { error: self.detail.clone() }).unwrap_or_default()
    }
}

/// The sentence of a problem, or of what a path without a version has instead.
pub fn detail(body: &[u8]) -> Option<String> {
    let problem = serde_json::from_slice(body).map(|problem: Problem| problem.detail);
    problem.or_else(|_| serde_json::from_slice(body).map(|body: Unversioned| body.error)).ok()
}

#[derive(Serialize, Deserialize)]
struct Unversioned {
    error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_found_in_both_kinds_of_bodies() {
        let problem = Problem::new(409, "Conflict", "the VM is stopped");
        assert_eq!(
            String::from_utf8(problem.to_json()).expect("JSON"),
            r#"{"type":"about:blank","title":"Conflict","status":409,"detail":"the VM is stopped"}"#
        );
        for body in [problem.to_json(), problem.to_unversioned_json()] {
            assert_eq!(detail(&body).as_deref(), Some("the VM is stopped"));
        }
        // RFC 9457, section 3: a type that is not there is about:blank.
        assert!(detail(br#"{"status":404,"detail":"x"}"#).is_some());
        assert_eq!(detail(b"{}"), None);
    }
}
