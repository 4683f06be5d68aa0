//! What VMs used in the last minutes, and its picture in one line of text.

use std::collections::{HashMap, VecDeque};

use api::units::Bytes;

use super::snapshot::Vm;

/// How many moments are kept: two minutes of seconds.
const LENGTH: usize = 120;

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One moment of one VM.
#[derive(Clone, Copy)]
struct Moment {
    used: Option<Bytes>,
    had: Bytes,
}

/// The last moments of each VM, by name.
#[derive(Default)]
pub struct History(HashMap<String, VecDeque<Moment>>);

impl History {
    /// Takes in a moment. Those who are no longer there are forgotten.
    pub fn push(&mut self, vms: &[Vm]) {
        let mut before = std::mem::take(&mut self.0);
        for vm in vms {
            let mut moments = before.remove(&vm.name).unwrap_or_default();
            if moments.len() == LENGTH {
                moments.pop_front();
            }
            moments.push_back(Moment {
                used: vm.memory.and_then(|memory| memory.used),
                had: vm.memory.map_or(Bytes::ZERO, |memory| memory.actual),
            });
            self.0.insert(vm.name.clone(), moments);
        }
    }

    /// The last `width` moments, the newest at the right: a full bar is the most that the
    /// VM had in that time, so that a high line is a VM that uses all it has.
    pub fn line(&self, name: &str, width: usize) -> String {
        let Some(moments) = self.0.get(name) else { return String::new() };
        let shown = moments.iter().skip(moments.len().saturating_sub(width));
        let whole = shown.clone().map(|moment| moment.had).max().unwrap_or_default();
        let bars = shown.map(|moment| moment.used.map_or(' ', |used| bar(used, whole)));
        let gap = width.saturating_sub(moments.len());
        std::iter::repeat_n(' ', gap).chain(bars).collect()
    }
}

fn bar(used: Bytes, whole: Bytes) -> char {
    let eighths = u128::from(used.0) * 8 / u128::from(whole.0.max(1));
    BARS[usize::try_from(eighths).unwrap_or(usize::MAX).min(BARS.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::super::testing::vm;
    use super::*;

    #[test]
    fn a_line_ends_with_now_and_is_scaled_to_what_the_vm_had() {
        let mut history = History::default();
        for used in [0, 128, 255, 1024] {
            history.push(&[vm("web", used, 256)]);
        }
        assert_eq!(history.line("web", 6), "  ▁▅██");
        assert_eq!(history.line("web", 2), "██");
        assert_eq!(history.line("other", 6), "");
        history.push(&[]);
        assert_eq!(history.line("web", 6), "", "it has gone");
    }

    #[test]
    fn it_keeps_no_more_than_two_minutes() {
        let mut history = History::default();
        for _ in 0..500 {
            history.push(&[vm("web", 1, 256)]);
        }
        assert_eq!(history.0["web"].len(), LENGTH);
    }
}
