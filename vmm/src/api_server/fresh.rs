//! How fresh a guest's figures shall be: the query of `GET /memory`.

use std::time::Duration;

/// How long an answer waits for the guest's report where the request does not say.
pub const USUAL_WAIT: Duration = Duration::from_millis(100);

/// How long an answer may wait for it at most.
pub const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Why a query makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// Not one of the two.
    #[error("there is no parameter {0:?} here: max_age_ms and wait_ms are all there are")]
    Unknown(String),
    /// Which of them counts?
    #[error("{0} is given twice: give it once")]
    Twice(&'static str),
    /// No number, or one beyond all time.
    #[error("{name} is {value:?}: give a number of milliseconds, such as {name}=20")]
    NoNumber {
        /// The parameter.
        name: &'static str,
        /// As sent.
        value: String,
    },
    /// Longer than [`LONGEST_WAIT`].
    #[error("wait_ms is {0}: wait 1000 ms at most, and ask again where that is not enough")]
    TooLong(u64),
}

/// What a client asks of the age of the guest's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// The guest is asked anew where its report is older; `None` where any will do.
    pub max_age: Option<Duration>,
    /// How long the answer waits for the new report.
    pub wait: Duration,
}

impl Fresh {
    /// Reads `max_age_ms=N&wait_ms=M`, both of which may be missing.
    ///
    /// # Errors
    /// [`QueryError`], for whatever else stands there.
    pub fn parse(query: &str) -> Result<Self, QueryError> {
        let (mut max_age, mut wait) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, place) = match name {
                "max_age_ms" => ("max_age_ms", &mut max_age),
                "wait_ms" => ("wait_ms", &mut wait),
                _ => return Err(QueryError::Unknown(name.to_owned())),
            };
            if place.replace(milliseconds(name, value)?).is_some() {
                return Err(QueryError::Twice(name));
            }
        }
        let wait = wait.map_or(USUAL_WAIT, Duration::from_millis);
        if wait > LONGEST_WAIT {
            return Err(QueryError::TooLong(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)));
        }
        Ok(Self { max_age: max_age.map(Duration::from_millis), wait })
    }
}

fn milliseconds(name: &'static str, value: &str) -> Result<u64, QueryError> {
    // `u64::from_str` would take a plus sign.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse().ok().filter(|_| digits);
    number.ok_or_else(|| QueryError::NoNumber { name, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parameters_may_be_missing() {
        let ms = Duration::from_millis;
        for (query, max_age, wait) in [
            ("", None, USUAL_WAIT),
            ("max_age_ms=20", Some(ms(20)), USUAL_WAIT),
            ("max_age_ms=0&wait_ms=0", Some(ms(0)), ms(0)),
            ("wait_ms=1000&max_age_ms=18446744073709551615", Some(ms(u64::MAX)), LONGEST_WAIT),
            ("wait_ms=7&", None, ms(7)),
        ] {
            assert_eq!(Fresh::parse(query), Ok(Fresh { max_age, wait }), "{query}");
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for (query, named) in [
            ("max_age=20", "\"max_age\""),
            ("max_age_ms", "max_age_ms"),
            ("max_age_ms=", "such as max_age_ms=20"),
            ("max_age_ms=+5", "\"+5\""),
            ("max_age_ms=-5", "\"-5\""),
            ("wait_ms=1s", "such as wait_ms=20"),
            ("wait_ms=18446744073709551616", "such as wait_ms=20"),
            ("wait_ms=1001", "1000 ms at most"),
            ("max_age_ms=1&max_age_ms=1", "max_age_ms is given twice"),
            ("max_age_ms=1&max_age_ms=2&x", "twice"),
            ("=1", "no parameter \"\""),
        ] {
            let sentence = Fresh::parse(query).unwrap_err().to_string();
            assert!(sentence.contains(named), "{query}: {sentence}");
        }
    }
}
