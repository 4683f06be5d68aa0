//! Lines out of a stream that may hold anything: bounded, in whatever pieces they come.

use api::client::LARGEST_ANSWER;

/// A line that is longer than anything a sound peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

/// Bytes that have come and whole lines that have not been taken yet.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    /// Up to here no line ends.
    looked: usize,
    /// How many bytes wait for the end of their line.
    unfinished: usize,
}

impl Lines {
    /// Takes in what came.
    ///
    /// # Errors
    /// [`TooLong`] where more than [`LARGEST_ANSWER`] bytes wait without making a line.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        self.bytes.extend_from_slice(bytes);
        self.unfinished = match bytes.iter().rev().position(|&byte| byte == b'\n') {
            Some(behind) => behind,
            None => self.unfinished.saturating_add(bytes.len()),
        };
        if self.unfinished > LARGEST_ANSWER { Err(TooLong) } else { Ok(()) }
    }

    /// The next whole line without its end, if one has come. Empty lines are passed over.
    pub fn pop(&mut self) -> Option<Vec<u8>> {
        loop {
            let fresh = self.bytes.get(self.looked..).unwrap_or_default();
            let Some(length) = fresh.iter().position(|&byte| byte == b'\n') else {
                self.looked = self.bytes.len();
                return None;
            };
            let end = self.looked + length;
            let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
            self.looked = 0;
            while line.last().is_some_and(u8::is_ascii_whitespace) {
                line.pop();
            }
            if !line.is_empty() {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(lines: &mut Lines) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| lines.pop()).collect()
    }

    proptest! {
        /// However a stream is cut up, the same lines come out, as splitting it whole gives.
        #[test]
        fn pieces_make_no_difference(
            stream in prop::collection::vec(prop_oneof![3 => Just(b'\n'), 1 => Just(b'\r'), 8 => any::<u8>()], 0..400),
            pieces in prop::collection::vec(1usize..50, 1..80),
        ) {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            let mut rest = stream.as_slice();
            for piece in pieces.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*piece).min(rest.len()));
                lines.push(now).unwrap();
                found.extend(all(&mut lines));
                rest = later;
            }
            let end = stream.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            let expected: Vec<Vec<u8>> = stream[..end]
                .split(|&byte| byte == b'\n')
                .map(|line| line.trim_ascii_end().to_vec())
                .filter(|line| !line.is_empty())
                .collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_line_without_an_end_is_refused_before_it_fills_memory() {
        let mut lines = Lines::default();
        let mut pushed = 0;
        while lines.push(&[b'x'; 4096]).is_ok() {
            pushed += 4096;
            assert_eq!(lines.pop(), None);
            assert!(pushed <= LARGEST_ANSWER);
        }
        assert!(pushed + 4096 > LARGEST_ANSWER);
    }
}
