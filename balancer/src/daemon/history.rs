//! What was decided lately and what became of it, to answer why a VM has what it has.
//!
//! Bounded for each VM and in all. It is kept in memory only: a new daemon explains its own decisions alone.

use std::collections::{BTreeMap, VecDeque};

use api::limits::Limits;
use api::status::Pauser;
use api::units::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::state::{Holder, MemoryView, VmView};
use crate::policy::guards::Standing;
use crate::policy::reason::Reason;

/// How many decisions and changes of standing are kept for one VM.
pub const KEPT_OF_A_VM: usize = 32;

/// How many decisions about all VMs together are kept.
pub const KEPT_OF_ALL: usize = 256;

/// What became of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// The VM carried it out: it has the target, is paused, or runs on.
    Taken,
    /// The host's operator was told; nothing was asked of the VM.
    Advised,
    /// The VM refused it; what was before still holds.
    Refused,
    /// The VM gave no usable answer: either target may hold.
    Unanswered,
    /// The VM was not told: an earlier request to it was still open, or somebody else sets its target too.
    Postponed,
}

/// One decision with all its numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DecisionView {
    /// Which VM.
    pub vm: String,
    /// Milliseconds since it was made last.
    pub age_ms: u64,
    /// What became of it.
    pub fate: Fate,
    /// What the VM answered, if it did not carry it out.
    #[serde(rename = "complaint", skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// How often in a row the same was decided with the same fate.
    pub times: u64,
    /// The numbers.
    #[serde(flatten)]
    pub reason: Reason,
    /// The same as a sentence.
    pub sentence: String,
}

/// A change of a VM's standing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingView {
    /// Milliseconds since then.
    pub age_ms: u64,
    /// The new standing.
    pub standing: Standing,
}

/// `GET /vms/NAME/why`: how one VM came to have what it has. The newest comes first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Why {
    /// Which VM.
    pub name: String,
    /// How it stands.
    pub standing: Standing,
    /// Why it has what it has now, as a sentence.
    pub sentence: String,
    /// Its memory; absent if it never answered.
    pub memory: Option<MemoryView>,
    /// Milliseconds since the guest's last report.
    pub report_age_ms: Option<u64>,
    /// The last decisions about it.
    pub decisions: Vec<DecisionView>,
    /// Its last standings.
    pub standings: Vec<StandingView>,
}

/// `GET /decisions`: the last decisions about any VM. The newest comes first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Decisions {
    /// Those decisions.
    pub decisions: Vec<DecisionView>,
}

#[derive(Clone, Debug)]
struct Record {
    at: Instant,
    vm: String,
    fate: Fate,
    error: Option<String>,
    times: u64,
    reason: Reason,
}

impl Record {
    fn repeats(&self, other: &Self) -> bool {
        let (a, b) = (&self.reason, &other.reason);
        self.vm == other.vm
            && self.fate == other.fate
            && (a.rule, a.old, a.new) == (b.rule, b.old, b.new)
            && self.error == other.error
    }

    fn view(&self) -> DecisionView {
        DecisionView {
            vm: self.vm.clone(),
            age_ms: milliseconds(self.at),
            fate: self.fate,
            error: self.error.clone(),
            times: self.times,
            reason: self.reason,
            sentence: self.reason.to_string(),
        }
    }
}

#[derive(Debug, Default)]
struct Past {
    decisions: VecDeque<Record>,
    standings: VecDeque<(Instant, Standing)>,
    /// Which way the target was last moved.
    rose: Option<bool>,
    reversals: u64,
}

/// The past of every VM.
#[derive(Debug, Default)]
pub struct History {
    of: BTreeMap<String, Past>,
    all: VecDeque<Record>,
}

impl History {
    /// Keeps a decision about `vm`.
    pub fn decided(&mut self, vm: &str, reason: Reason, fate: Fate, error: Option<String>) {
        let record = Record { at: Instant::now(), vm: vm.to_owned(), fate, error, times: 1, reason };
        let past = self.of.entry(vm.to_owned()).or_default();
        if record.fate == Fate::Taken && record.reason.new != record.reason.old {
            let rises = record.reason.new > record.reason.old;
            past.reversals += u64::from(past.rose.replace(rises).is_some_and(|rose| rose != rises));
        }
        keep(&mut past.decisions, record.clone(), KEPT_OF_A_VM);
        keep(&mut self.all, record, KEPT_OF_ALL);
    }

    /// Keeps how `vm` stands, if that changed.
    pub fn stands(&mut self, vm: &str, standing: Standing) {
        if let Some(past) = self.of.get_mut(vm) {
            if past.standings.back().is_some_and(|&(_, last)| last == standing) {
                return;
            }
            if past.standings.len() == KEPT_OF_A_VM {
                past.standings.pop_front();
            }
            past.standings.push_back((Instant::now(), standing));
        } else {
            let past = Past { standings: [(Instant::now(), standing)].into(), ..Past::default() };
            self.of.insert(vm.to_owned(), past);
        }
    }

    /// How often a VM's target was moved against its last move.
    pub fn reversals(&self, vm: &str) -> u64 {
        self.of.get(vm).map_or(0, |past| past.reversals)
    }

    /// Forgets a VM that has gone. The list of all VMs' decisions keeps its entries for a while.
    pub fn forget(&mut self, vm: &str) {
        self.of.remove(vm);
    }

    /// The last decisions about any VM.
    pub fn decisions(&self) -> Decisions {
        Decisions { decisions: self.all.iter().rev().map(Record::view).collect() }
    }

    /// What is known of one VM's past.
    pub fn why(&self, vm: &VmView) -> Why {
        let past = self.of.get(&vm.name);
        Why {
            name: vm.name.clone(),
            standing: vm.standing,
            sentence: explain(vm),
            memory: vm.memory.clone(),
            report_age_ms: vm.report_age_ms,
            decisions: past
                .map_or_else(Vec::new, |past| past.decisions.iter().rev().map(Record::view).collect()),
            standings: past.map_or_else(Vec::new, |past| {
                past.standings
                    .iter()
                    .rev()
                    .map(|&(since, standing)| StandingView { age_ms: milliseconds(since), standing })
                    .collect()
            }),
        }
    }
}

fn keep(records: &mut VecDeque<Record>, record: Record, most: usize) {
    if let Some(last) = records.back_mut().filter(|last| last.repeats(&record)) {
        *last = Record { times: last.times.saturating_add(1), ..record };
        return;
    }
    if records.len() == most {
        records.pop_front();
    }
    records.push_back(record);
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Why a VM has what it has at this moment.
fn explain(vm: &VmView) -> String {
    let mut sentence = explain_standing(vm);
    if let Some(MemoryView { limits, cgroup_limit: Some(limit), .. }) = &vm.memory
        && *limit < limits.max()
    {
        sentence += &format!(
            " Its control group allows it {limit}, so it is given no more than that of its max of {}.",
            limits.max()
        );
    }
    match vm.memory.as_ref().map(|memory| memory.holder) {
        Some(Holder::OtherPidNamespace) => {
            sentence +=
                " Its process lives in another PID namespace: what it or its VMM says counts as held.";
        }
        Some(Holder::Hidden) => {
            sentence += " The kernel does not show its process here: what it or its VMM says counts as held.";
        }
        Some(Holder::Known | Holder::NotMet) | None => {}
    }
    sentence
}

fn explain_standing(vm: &VmView) -> String {
    let Some(memory) = &vm.memory else {
        return match vm.held {
            Some(held) => {
                format!(
                    "It has not answered yet: it is charged the {held} that the host holds for its process."
                )
            }
            None => "It has not answered yet: what it holds is unknown, and it is left out.".to_owned(),
        };
    };
    if memory.reserved_huge_pages {
        return format!(
            "Its memory lies in the host's reserved huge pages, which are no part of the budget: it is not \
             moved, and only the {} that its process holds beside them are taken from what others may have.",
            memory.overhead
        );
    }
    let MemoryView { limits, used, demand, entitlement, target, actual, host_rss, charge, .. } = memory;
    match vm.standing {
        Standing::Static => format!("Its limits leave nothing to move: it has {target}, always."),
        Standing::Booting => {
            format!("It is starting: its balloon has not reached {target} yet. It is charged {charge}.")
        }
        Standing::Leaving => {
            format!("Its balloon driver has just gone, as when a guest shuts down. It is charged {charge}.")
        }
        Standing::NoDriver => {
            format!("No balloon driver runs in its guest: nothing can be moved, and it is charged {charge}.")
        }
        Standing::NotAnswering => {
            format!("Its API does not answer as it should: it is left as it is, charged {charge}.")
        }
        Standing::Stale => {
            let silent = vm.report_age_ms.map_or("has never reported".to_owned(), |age| {
                format!("has not reported for {} s", age / 1000)
            });
            format!("Its guest {silent}: it has {target} and is not shrunk until it reports.")
        }
        Standing::Stuck => {
            format!("It did not give up what it was asked for: it keeps {actual} and is left alone a while.")
        }
        Standing::Paused => {
            let more = (*target).max(*actual).max(host_rss.unwrap_or_default()).saturating_sub(*charge);
            match vm.paused_by {
                Some(Pauser::Balancer) => format!(
                    "The balancer paused it, as memory had run out: it touches no more than the {charge} that \
                     the host holds for it. It runs on when the others can spare {more}, or at once by \
                     `ballast resume {}`.",
                    vm.name
                ),
                Some(Pauser::Disk) => format!(
                    "It paused itself, as the host could not do what its guest asked of a disk: `ballast ps` says what \
                     to do. It may run on at any moment, so it is charged {charge}."
                ),
                Some(Pauser::Operator) | None => format!(
                    "It is paused, and not by the balancer, which leaves it so: it may run on at any moment, \
                     so it is charged {charge}."
                ),
            }
        }
        Standing::Following => following(*limits, *used, *demand, *entitlement, *target, *actual),
    }
}

fn following(
    limits: Limits,
    used: Option<Bytes>,
    demand: Bytes,
    entitlement: Bytes,
    target: Bytes,
    actual: Bytes,
) -> String {
    let uses = used.map_or("It never said what it uses".to_owned(), |used| format!("It uses {used}"));
    let end = if actual > target {
        format!("it was asked to have {target} and still has {actual}")
    } else if entitlement < demand {
        format!("memory is short, so that it may have {entitlement}, and was asked to have {target}")
    } else if target == limits.max() {
        format!("it has {target}, which is its max")
    } else if target == limits.min() {
        format!("it has {target}, which is its min")
    } else {
        format!("it has {target}, which is not worth a change")
    };
    format!("{uses} and wants {demand} with its buffer of {} %; {end}.", limits.buffer_percent())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::host_state::HostState;
    use crate::policy::reason::Rule;

    fn reason(old: u64, new: u64) -> Reason {
        Reason {
            used: Some(Bytes::mib(100)),
            demand: Bytes::mib(120),
            entitlement: Bytes::mib(new),
            state: HostState::Normal,
            rule: if new > old { Rule::Grow } else { Rule::Pay },
            old: Bytes::mib(old),
            new: Bytes::mib(new),
        }
    }

    fn view(name: &str) -> VmView {
        VmView {
            name: name.to_owned(),
            vmm: crate::driver::Kind::Ballast,
            standing: Standing::Following,
            paused_by: None,
            memory: None,
            held: None,
            report_age_ms: None,
            last_reason: None,
            grows: 0,
            shrinks: 0,
            errors: 0,
        }
    }

    #[test]
    fn the_newest_comes_first_and_the_oldest_is_dropped() {
        let mut history = History::default();
        for n in 0..1000 {
            history.decided("web", reason(n, n + 1), Fate::Taken, None);
        }
        let why = history.why(&view("web"));
        assert_eq!(why.decisions.len(), KEPT_OF_A_VM);
        assert_eq!(why.decisions[0].reason.new, Bytes::mib(1000));
        assert_eq!(history.decisions().decisions.len(), KEPT_OF_ALL);
        assert!(history.why(&view("db")).decisions.is_empty());
    }

    #[test]
    fn the_same_again_is_counted_and_not_kept_again() {
        let mut history = History::default();
        for _ in 0..50 {
            history.decided("web", reason(1, 2), Fate::Refused, Some("no driver".to_owned()));
            history.decided("db", reason(1, 2), Fate::Taken, None);
        }
        history.decided("web", reason(1, 2), Fate::Taken, None);
        let why = history.why(&view("web"));
        let seen: Vec<_> = why.decisions.iter().map(|decision| (decision.fate, decision.times)).collect();
        assert_eq!(seen, [(Fate::Taken, 1), (Fate::Refused, 50)]);
        assert_eq!(why.decisions[1].error.as_deref(), Some("no driver"));
    }

    #[test]
    fn standings_are_kept_when_they_change() {
        let mut history = History::default();
        for standing in [Standing::Booting, Standing::Following, Standing::Following, Standing::Stuck] {
            history.stands("web", standing);
        }
        let standings: Vec<_> =
            history.why(&view("web")).standings.into_iter().map(|view| view.standing).collect();
        assert_eq!(standings, [Standing::Stuck, Standing::Following, Standing::Booting]);
        history.forget("web");
        assert!(history.why(&view("web")).standings.is_empty());
    }

    #[test]
    fn a_reversal_is_a_move_the_other_way_that_was_made() {
        let mut history = History::default();
        for (old, new, fate) in [
            (1, 2, Fate::Taken),
            (2, 3, Fate::Taken),
            (3, 2, Fate::Refused),
            (3, 1, Fate::Taken),
            (1, 0, Fate::Taken),
            (0, 9, Fate::Taken),
        ] {
            history.decided("web", reason(old, new), fate, None);
        }
        assert_eq!(history.reversals("web"), 2);
        assert_eq!(history.reversals("db"), 0);
    }

    #[test]
    fn every_standing_has_its_sentence() {
        let memory = MemoryView {
            limits: "256M,min=128M,max=1G".parse().unwrap(),
            used: Some(Bytes::mib(300)),
            demand: Bytes::mib(360),
            entitlement: Bytes::mib(200),
            target: Bytes::mib(200),
            actual: Bytes::mib(200),
            unmanaged: Bytes::ZERO,
            host_rss: Some(Bytes::mib(190)),
            holder: Holder::Known,
            huge_percent: None,
            overhead: Bytes::ZERO,
            charge: Bytes::mib(200),
            cgroup_limit: None,
            reserved_huge_pages: false,
        };
        assert!(explain(&view("web")).contains("not answered yet"));
        let unheard = VmView { held: Some(Bytes::mib(77)), ..view("web") };
        assert!(explain(&unheard).contains("77 MiB"));
        let apart = Some(MemoryView { reserved_huge_pages: true, ..memory.clone() });
        assert!(explain(&VmView { memory: apart, ..view("web") }).contains("reserved huge pages"));
        let hidden = Some(MemoryView { holder: Holder::Hidden, ..memory.clone() });
        assert!(explain(&VmView { memory: hidden, ..view("web") }).contains("does not show its process"));
        let limited = Some(MemoryView { cgroup_limit: Some(Bytes::mib(500)), ..memory.clone() });
        assert!(
            explain(&VmView { memory: limited, ..view("web") }).contains("control group allows it 500 MiB")
        );
        for (standing, word) in [
            (Standing::Following, "memory is short"),
            (Standing::Static, "nothing to move"),
            (Standing::Booting, "starting"),
            (Standing::Leaving, "shuts down"),
            (Standing::NoDriver, "No balloon driver"),
            (Standing::NotAnswering, "does not answer"),
            (Standing::Stale, "never reported"),
            (Standing::Stuck, "left alone"),
        ] {
            let view = VmView { standing, memory: Some(memory.clone()), ..view("web") };
            assert!(explain(&view).contains(word), "{}", explain(&view));
        }
        for (by, word) in [(Pauser::Balancer, "spare 80 MiB"), (Pauser::Operator, "not by the balancer")] {
            let memory = Some(MemoryView { charge: Bytes::mib(120), ..memory.clone() });
            let view = VmView { standing: Standing::Paused, paused_by: Some(by), memory, ..view("web") };
            assert!(explain(&view).contains(word), "{}", explain(&view));
        }
    }
}
