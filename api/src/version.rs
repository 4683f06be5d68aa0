//! Which version of the APIs there is, and until when requests without one are answered.

/// What every path begins with.
pub const PREFIX: &str = "/v1";

/// Since when paths without [`PREFIX`] are deprecated: the value of `Deprecation` (RFC 9745), 1 December 2026.
pub const DEPRECATED: &str = "@1796083200";

/// From when on they may no longer be answered: the value of `Sunset` (RFC 8594). No sooner than with the next release.
pub const SUNSET: &str = "Tue, 01 Jun 2027 00:00:00 GMT";

/// The headers of an answer to a request for `path`, which has no version: that it is deprecated, until when it is
/// there, and what takes its place (RFC 5829).
pub fn announcement(path: &str) -> [(&'static str, String); 3] {
    [
        ("Deprecation", DEPRECATED.to_owned()),
        ("Sunset", SUNSET.to_owned()),
        ("Link", format!("<{PREFIX}{path}>; rel=\"successor-version\"")),
    ]
}
