//! Text that somebody else wrote.

/// The longest sentence that is passed on, in characters.
const LONGEST_SENTENCE: usize = 300;

/// Text from a process that may have been taken over, made fit for a log line or a terminal: one line, no
/// escapes, bounded.
pub fn clean(text: &str) -> String {
    text.trim().chars().take(LONGEST_SENTENCE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_others_cannot_drive_a_terminal() {
        let hostile = format!("\n a\x1b[2J\nb\r{}", "x".repeat(1000));
        let cleaned = clean(&hostile);
        assert!(cleaned.starts_with("a ") && !cleaned.chars().any(char::is_control), "{cleaned:?}");
        assert_eq!(cleaned.chars().count(), LONGEST_SENTENCE);
    }
}
