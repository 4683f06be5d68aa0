//! Output between a port and its reader, on a clock of its own; rests.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::burst::{BURST, Burst, IDLE};
use super::output::FirstReader;
use super::*;

fn put(output: &Output, text: &[u8]) {
    let now = Instant::now();
    text.iter().for_each(|byte| _ = output.put(*byte, now));
}

/// Without waiting.
fn take(output: &Output) -> Vec<u8> {
    let mut chunk = Vec::new();
    output.lock().give(&mut chunk);
    chunk
}

fn take_all(output: &Output) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let chunk = take(output);
        if chunk.is_empty() {
            return all;
        }
        let _ = output.written(chunk.len());
        all.extend(chunk);
    }
}

fn mark(count: usize) -> Vec<u8> {
    format!("\r\n[ballast: {count} bytes of console output are missing here]\r\n").into_bytes()
}

#[test]
fn what_is_lost_is_whole_lines_counted_and_marked() {
    let output = Output::new(FirstReader::Awaited);
    let lines: Vec<String> = (0..).map(|number| format!("line {number}\n")).take(10_000).collect();
    let text = lines.concat().into_bytes();
    put(&output, &text);
    output.reader_came();
    let counts = output.counts();
    let lost = text.len() - counts.waiting as usize;
    assert_eq!(counts.lost, lost as u64);
    assert!(counts.waiting as usize > MOST_UNREAD * 9 / 10 && counts.waiting as usize <= MOST_UNREAD);
    assert!(text[..lost].ends_with(b"\n"));
    let read = take_all(&output);
    assert!(read == [mark(lost), text[lost..].to_vec()].concat());
    assert_eq!(
        output.counts(),
        OutputCounts { written: (text.len() - lost) as u64, waiting: 0, lost: lost as u64 }
    );
}

#[test]
fn a_gap_is_where_it_belongs_when_only_a_part_of_a_chunk_is_taken() {
    let output = Output::new(FirstReader::Awaited);
    let text = vec![b'x'; MOST_UNREAD];
    put(&output, &text);
    output.reader_came();
    assert_eq!(take(&output).len(), CHUNK);
    // The reader goes in the middle of it, and what does not fit any more is lost behind it.
    assert!(!output.reader_left());
    put(&output, b"y");
    let _ = output.written(100);
    output.reader_came();
    let lost = output.counts().lost as usize;
    assert!(lost > 0);
    let rest = vec![b'x'; MOST_UNREAD - CHUNK - lost];
    let expected = [vec![b'x'; CHUNK - 100], mark(lost), rest, b"y".to_vec()].concat();
    assert!(take_all(&output) == expected);
}

#[test]
fn a_reader_who_has_gone_for_good_is_waited_for_no_longer() {
    let output = Output::new(FirstReader::Present);
    put(&output, b"some");
    let _ = output.reader_gone();
    put(&output, b"more");
    assert_eq!(output.counts(), OutputCounts { written: 0, waiting: 0, lost: 8 });
    assert!(!output.next(&mut Vec::new()));
}

#[test]
fn output_that_nobody_wants_is_not_lost() {
    let output = Output::new(FirstReader::Nobody);
    put(&output, b"some");
    assert_eq!(output.counts(), OutputCounts::default());
    assert!(!output.next(&mut Vec::new()));
}

#[test]
fn a_file_that_refuses_is_tried_again_and_holds_nobody() {
    let output = Output::new(FirstReader::Present);
    put(&output, b"first\n");
    let mut chunk = Vec::new();
    assert!(output.next(&mut chunk));
    let until = Instant::now() + Duration::from_millis(20);
    let _ = output.refused(until);
    put(&output, &vec![b'x'; 2 * MOST_UNREAD]);
    assert_eq!(output.room(Instant::now()), Ok(()));
    assert!(output.counts().waiting <= MOST_UNREAD as u64);
    assert!(output.next(&mut chunk));
    assert!(Instant::now() >= until, "it is left alone for a while");
    assert!(chunk.starts_with(b"\r\n[ballast: "), "{:?}", String::from_utf8_lossy(&chunk));
}

#[test]
fn a_flood_leaves_no_memory_behind() {
    let output = Output::new(FirstReader::Present);
    put(&output, &vec![b'x'; 2 * MOST_WAITING]);
    take_all(&output);
    assert!(output.lock().capacity() <= MOST_UNREAD);
}

#[test]
fn a_burst_ends_with_a_rest_and_a_pause_begins_it_anew() {
    let begin = Instant::now();
    let mut burst = Burst::New;
    let spend = |burst: &mut Burst, from: Instant, count: u32| {
        (0..count).fold(from, |now, _| {
            burst.spend(now);
            now + Duration::from_micros(10)
        })
    };
    let now = spend(&mut burst, begin, BURST - 1);
    assert_eq!(burst.rest(now), None);
    let now = spend(&mut burst, now + IDLE, BURST - 1);
    assert_eq!(burst.rest(now), None);
    let now = spend(&mut burst, now, 1);
    let until = burst.rest(now).unwrap();
    // A load that had begun is finished, and is no reason to go on.
    let now = spend(&mut burst, now, 15);
    assert_eq!(burst.rest(now), Some(until));
    assert_eq!(burst.rest(until), None);
    burst.spend(until);
    assert_eq!(burst.rest(until), None);
}

#[derive(Clone, Debug)]
enum Step {
    Put(usize),
    Give,
    Written(usize),
    NotWritten,
    Came,
    Left,
    Refused,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1_usize..40_000).prop_map(Step::Put),
        6 => Just(Step::Give),
        4 => (0_usize..2 * CHUNK).prop_map(Step::Written),
        1 => Just(Step::NotWritten),
        1 => Just(Step::Came),
        1 => Just(Step::Left),
        1 => Just(Step::Refused),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// With each mark replaced by as many bytes as it says are missing, the stream is whole.
    #[test]
    fn whatever_happens_each_byte_is_read_or_missing_where_a_mark_is(steps in vec(step(), 0..150)) {
        let output = Output::new(FirstReader::Present);
        let (mut read, mut chunk, mut count) = (Vec::new(), Vec::new(), 0_usize);
        for step in steps {
            match step {
                Step::Put(more) => {
                    // Each byte is known by its place; none looks like a mark or ends a line.
                    let text: Vec<u8> = (count..count + more).map(|place| 128 + (place % 127) as u8).collect();
                    put(&output, &text);
                    count += more;
                }
                Step::Give if chunk.is_empty() => chunk = take(&output),
                Step::Written(most) => {
                    let taken = most.min(chunk.len());
                    read.extend(&chunk[..taken]);
                    let _ = output.written(taken);
                    chunk.clear();
                }
                Step::NotWritten => {
                    output.not_written();
                    chunk.clear();
                }
                Step::Refused => {
                    let _ = output.refused(Instant::now());
                    chunk.clear();
                }
                Step::Came => output.reader_came(),
                Step::Left => drop(output.reader_left()),
                Step::Give => {}
            }
            prop_assert!(output.counts().waiting <= MOST_WAITING as u64);
        }
        output.not_written();
        output.reader_came();
        read.extend(take_all(&output));
        let lost = output.counts().lost;
        let (mut place, mut missing, mut rest) = (0_usize, 0_u64, read.as_slice());
        while let Some((&byte, tail)) = rest.split_first() {
            rest = tail;
            if byte >= 128 {
                prop_assert_eq!(byte, 128 + (place % 127) as u8, "at {}", place);
                place += 1;
            } else if byte.is_ascii_digit() {
                let digits = 1 + rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
                let text = [&[byte], &rest[..digits - 1]].concat();
                let gap: usize = String::from_utf8(text).unwrap().parse().unwrap();
                (place, missing) = (place + gap, missing + gap as u64);
                rest = &rest[digits - 1..];
            }
        }
        prop_assert_eq!(place, count);
        prop_assert_eq!(missing, lost);
    }
}
