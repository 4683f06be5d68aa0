//! Generations of what clients set, against lost updates: who has read one changes it only where nobody else has
//! meanwhile, by `If-Match` (RFC 9110, section 13.1.1).

use crate::control::Control;

/// The generation of the limits: another one after each change, also back to what they were.
pub fn of_limits(control: &Control) -> String {
    let (life, changes) = control.limits_generation();
    format!("\"{life:x}-{changes}\"")
}

/// The generation of the target, which the balancer changes all the time: its value.
pub fn of_target(control: &Control) -> String {
    format!("\"{}\"", control.memory().target.0)
}

/// Whether what a client knows of is `now`. Any is, where it does not say.
pub fn matches(known: Option<&[u8]>, now: &str) -> bool {
    let Some(known) = known else { return true };
    // Weak ones never match here, and none of ours has a comma.
    known.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).any(|tag| tag == b"*" || tag == now.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api_server::document::control;

    #[test]
    fn a_generation_is_known_or_not() {
        let known = |header: &str| matches(Some(header.as_bytes()), "\"a-1\"");
        assert!(matches(None, "\"a-1\""));
        for header in ["*", "\"a-1\"", "\"b\" , \"a-1\""] {
            assert!(known(header), "{header}");
        }
        for header in ["", "a-1", "W/\"a-1\"", "\"a-2\"", "\"a-1", "\"a-1\"x"] {
            assert!(!known(header), "{header}");
        }
    }

    #[test]
    fn limits_that_come_back_are_of_another_generation_and_the_same_ones_are_not() {
        let control = control();
        let (first, limits) = (of_limits(&control), control.limits());
        control.set_limits(limits).expect("they are the same");
        assert_eq!(of_limits(&control), first);
        control.set_limits("256M,min=64M,max=1G".parse().expect("limits")).expect("they fit");
        assert_ne!(of_limits(&control), first);
        control.set_limits(limits).expect("they fit");
        assert_ne!(of_limits(&control), first);
        // Nor does a VM that has started anew go on where another was.
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_ne!(of_limits(&super::super::document::control()), first);
    }
}
