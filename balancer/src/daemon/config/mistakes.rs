//! Reads TOML and reports all mistakes at once, not only the first.
//!
//! Deserializing stops at the first mistake. So the wrong entry is taken out and the rest is read again,
//! until nothing is wrong with it.

use std::fmt;
use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

/// The most mistakes that are looked for.
const MOST: usize = 100;

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The line, from 1.
    pub line: usize,
    /// The character in it, from 1.
    pub column: usize,
    /// The key with its tables in front, such as `policy.pool_percent`; empty where there is none.
    pub key: String,
    /// What is wrong and what is allowed.
    pub what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: ", self.line, self.column)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)
    }
}

/// Reads `text` as TOML.
///
/// # Errors
/// Every mistake in it, in the order of the lines.
pub fn read<T: DeserializeOwned>(text: &str) -> Result<T, Vec<Mistake>> {
    let (mut table, syntax) = DeTable::parse_recoverable(text);
    let mut mistakes: Vec<Mistake> =
        syntax.iter().map(|error| at(text, error.span(), String::new(), error.message())).collect();
    // What follows a mistake in the syntax would be guesswork.
    if !mistakes.is_empty() {
        return Err(mistakes);
    }
    let mut damaged: Vec<String> = Vec::new();
    loop {
        let error = match T::deserialize(toml::Deserializer::from(table.clone())) {
            Ok(value) if mistakes.is_empty() => return Ok(value),
            Ok(_) => break,
            Err(error) => error,
        };
        let key = error.span().and_then(|span| take_out(table.get_mut(), &span));
        let is_out = key.is_some();
        let key = key.unwrap_or_default();
        // A table lacks what was just taken out of it: that was reported already.
        if !(error.message().starts_with("missing field") && damaged.contains(&key)) {
            mistakes.push(at(text, error.span(), key.clone(), error.message()));
        }
        if let Some((table, _)) = key.rsplit_once('.') {
            damaged.push(table.to_owned());
        }
        if !is_out || mistakes.len() == MOST {
            break;
        }
    }
    mistakes.sort_by_key(|mistake| (mistake.line, mistake.column));
    Err(mistakes)
}

fn at(text: &str, span: Option<Range<usize>>, key: String, what: &str) -> Mistake {
    let before = text.get(..span.map_or(0, |span| span.start)).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    Mistake {
        line: before.matches('\n').count() + 1,
        column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
        key,
        what: what.replace('\n', "; "),
    }
}

/// Takes the innermost entry at `span` out of `table`. Returns its whole key.
fn take_out(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let keys: Vec<_> = table.iter().map(|(key, _)| key.clone()).collect();
    // Inner entries first: a table's own span may be its heading alone.
    for key in &keys {
        let within = table.get_mut(key).and_then(|value| take_out_of(value.get_mut(), span));
        if let Some(within) = within {
            let dot = if within.is_empty() { "" } else { "." };
            return Some(format!("{}{dot}{within}", key.get_ref()));
        }
    }
    for key in keys {
        let value = table.get(&key)?.span();
        if covers(&key.span(), span) || covers(&value, span) {
            table.remove(&key);
            return Some(key.into_inner().into_owned());
        }
    }
    None
}

fn take_out_of(value: &mut DeValue<'_>, span: &Range<usize>) -> Option<String> {
    match value {
        DeValue::Table(table) => take_out(table, span),
        DeValue::Array(array) => {
            if let Some(within) = array.iter_mut().find_map(|item| take_out_of(item.get_mut(), span)) {
                return Some(within);
            }
            let found = array.iter().position(|item| covers(&item.span(), span))?;
            let others = array.iter().enumerate().filter(|&(index, _)| index != found);
            *array = others.map(|(_, item)| item.clone()).collect();
            Some(String::new())
        }
        _ => None,
    }
}

fn covers(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// Checks what a type can't express, so that the error names the place of the value.
pub fn checked<'de, D, T, E>(from: D, check: impl FnOnce(&T) -> Result<(), E>) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de>,
    E: fmt::Display,
{
    let value = T::deserialize(from)?;
    check(&value).map_err(serde::de::Error::custom)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Outer {
        number: Option<u32>,
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Inner {
        name: String,
    }

    fn mistakes(text: &str) -> Vec<(usize, String, String)> {
        let mistakes = read::<Outer>(text).unwrap_err();
        mistakes.into_iter().map(|mistake| (mistake.line, mistake.key, mistake.what)).collect()
    }

    #[test]
    fn every_mistake_is_found_with_its_line_and_key() {
        let text = "\
number = \"one\"
numbr = 1
[inner]
name = 5
nam = \"x\"
[[list]]
name = \"a\"
[[list]]
name = true
";
        let found = mistakes(text);
        let places: Vec<_> = found.iter().map(|(line, key, _)| (*line, key.as_str())).collect();
        assert!(places.contains(&(1, "number")), "{found:#?}");
        assert!(places.contains(&(2, "numbr")), "{found:#?}");
        assert!(places.contains(&(4, "inner.name")), "{found:#?}");
        assert!(places.contains(&(5, "inner.nam")), "{found:#?}");
        assert!(places.contains(&(9, "list.name")), "{found:#?}");
        assert!(found.iter().any(|(_, _, what)| what.contains("expected one of `number`")), "{found:#?}");
    }

    #[test]
    fn what_is_not_toml_has_its_line() {
        let found = mistakes("number = 1\n= 2\n");
        assert_eq!(found[0].0, 2, "{found:#?}");
        assert!(read::<Outer>("number = 1").is_ok());
    }
}
