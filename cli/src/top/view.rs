//! What is on the screen, and what keys do to it. No terminal, no sockets.

use api::limits::Limits;
use api::units::Bytes;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::column::Column;
use super::editor::Line;
use super::history::History;
use super::snapshot::{Snapshot, Vm};

/// What the screen is used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The table.
    List,
    /// What the keys do.
    Help,
    /// Typing what names must contain.
    Find(Line),
    /// Typing new limits.
    Limits {
        /// Whose.
        vm: String,
        /// What they are.
        now: Limits,
        /// What they shall be.
        line: Line,
    },
}

/// What is left to do to whoever drives the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// End.
    Quit,
    /// Give the terminal back to the shell until it lets us go on.
    Suspend,
    /// Set a VM's limits.
    SetLimits {
        /// Which VM.
        vm: String,
        /// To what.
        limits: Limits,
    },
    /// Pause a VM that runs, or let one run on.
    PauseOrResume {
        /// Which VM.
        vm: String,
    },
}

/// A sentence about something that was done, or could not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The sentence.
    pub text: String,
    /// It could not be done.
    pub is_failure: bool,
}

/// What is on the screen.
pub struct View {
    /// How things stood when last asked.
    pub snapshot: Option<Snapshot>,
    /// How they stood before.
    pub history: History,
    /// What the table is ordered by.
    pub column: Column,
    /// The other way round.
    pub reversed: bool,
    /// What names must contain to be shown.
    pub find: String,
    /// What the screen is used for.
    pub mode: Mode,
    /// What is to be said until the next key.
    pub notice: Option<Notice>,
    /// The VMs that are shown, in order, as places in the snapshot.
    rows: Vec<usize>,
    /// The row that is chosen.
    chosen: usize,
    /// The first row on the screen.
    top: usize,
    /// Rows that fit on the screen.
    page: usize,
}

impl View {
    /// An empty screen.
    pub fn new(column: Column, reversed: bool) -> Self {
        Self {
            snapshot: None,
            history: History::default(),
            column,
            reversed,
            find: String::new(),
            mode: Mode::List,
            notice: None,
            rows: Vec::new(),
            chosen: 0,
            top: 0,
            page: 1,
        }
    }

    /// Takes in how things stand, or why that is not known: then the last picture stays.
    pub fn take(&mut self, news: Result<Snapshot, String>) {
        match news {
            Ok(snapshot) => {
                self.history.push(&snapshot.vms);
                let chosen = self.chosen().map(|vm| vm.name.clone());
                self.snapshot = Some(snapshot);
                self.arrange(chosen.as_deref());
            }
            Err(text) => self.notice = Some(Notice { text, is_failure: true }),
        }
    }

    /// Takes in what came of an action.
    pub fn done(&mut self, outcome: Result<String, String>) {
        let is_failure = outcome.is_err();
        let (Ok(text) | Err(text)) = outcome;
        self.notice = Some(Notice { text, is_failure });
    }

    /// Makes room for `page` rows, and keeps the chosen one among them.
    pub fn fit(&mut self, page: usize) {
        self.page = page.max(1);
        self.top = self.top.min(self.rows.len().saturating_sub(self.page));
        self.top = self.top.clamp((self.chosen + 1).saturating_sub(self.page), self.chosen);
    }

    /// The rows on the screen, each with whether it is the chosen one.
    pub fn shown(&self) -> impl Iterator<Item = (&Vm, bool)> {
        let rows = self.rows.iter().enumerate().skip(self.top).take(self.page);
        rows.filter_map(|(row, &at)| Some((self.vms().get(at)?, row == self.chosen)))
    }

    /// The first and the last row on the screen and how many there are, counted from one.
    pub fn place(&self) -> (usize, usize, usize) {
        let last = (self.top + self.page).min(self.rows.len());
        (last.min(self.top + 1), last, self.rows.len())
    }

    /// The chosen VM.
    pub fn chosen(&self) -> Option<&Vm> {
        self.vms().get(*self.rows.get(self.chosen)?)
    }

    fn vms(&self) -> &[Vm] {
        self.snapshot.as_ref().map_or(&[], |snapshot| &snapshot.vms)
    }

    /// Finds and orders the rows anew; the VM of that name stays the chosen one.
    fn arrange(&mut self, chosen: Option<&str>) {
        let vms = self.snapshot.as_ref().map_or(&[][..], |snapshot| &snapshot.vms);
        let mut rows: Vec<usize> = (0..vms.len()).filter(|&at| vms[at].name.contains(&self.find)).collect();
        rows.sort_by(|&a, &b| self.column.compare(&vms[a], &vms[b]));
        if self.reversed {
            rows.reverse();
        }
        let same = rows.iter().position(|&at| Some(vms[at].name.as_str()) == chosen);
        // One that has gone leaves its place to the next.
        self.chosen = same.unwrap_or(self.chosen).min(rows.len().saturating_sub(1));
        self.rows = rows;
        self.fit(self.page);
    }

    fn rearrange(&mut self) {
        let chosen = self.chosen().map(|vm| vm.name.clone());
        self.arrange(chosen.as_deref());
    }

    /// Takes in a key.
    pub fn key(&mut self, key: KeyEvent) -> Option<Action> {
        self.notice = None;
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            match key.code {
                KeyCode::Char('c') => return Some(Action::Quit),
                KeyCode::Char('z') => return Some(Action::Suspend),
                _ => {}
            }
        }
        match &mut self.mode {
            Mode::List => self.key_in_list(key),
            Mode::Help => {
                self.mode = Mode::List;
                None
            }
            Mode::Find(line) => {
                match key.code {
                    KeyCode::Esc => {
                        self.find.clear();
                        self.mode = Mode::List;
                    }
                    KeyCode::Enter => self.mode = Mode::List,
                    _ => {
                        line.key(key);
                        self.find = line.text();
                    }
                }
                self.rearrange();
                None
            }
            Mode::Limits { vm, line, .. } => match key.code {
                KeyCode::Esc => {
                    self.mode = Mode::List;
                    None
                }
                // While they are wrong the line under them says why.
                KeyCode::Enter => {
                    let limits = line.text().trim().parse().ok()?;
                    let vm = std::mem::take(vm);
                    self.mode = Mode::List;
                    Some(Action::SetLimits { vm, limits })
                }
                _ => {
                    line.key(key);
                    None
                }
            },
        }
    }

    fn key_in_list(&mut self, key: KeyEvent) -> Option<Action> {
        let last = self.rows.len().saturating_sub(1);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc if self.find.is_empty() => return Some(Action::Quit),
            KeyCode::Char('q') => return Some(Action::Quit),
            KeyCode::Esc => {
                self.find.clear();
                self.rearrange();
            }
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.mode = Mode::Help,
            KeyCode::Up | KeyCode::Char('k') => self.chosen = self.chosen.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.chosen = (self.chosen + 1).min(last),
            KeyCode::PageUp => self.chosen = self.chosen.saturating_sub(self.page),
            KeyCode::PageDown => self.chosen = (self.chosen + self.page).min(last),
            KeyCode::Home | KeyCode::Char('g') => self.chosen = 0,
            KeyCode::End | KeyCode::Char('G') => self.chosen = last,
            KeyCode::Left | KeyCode::Char('<') => self.order_by(-1),
            KeyCode::Right | KeyCode::Char('>') => self.order_by(1),
            KeyCode::Char('r') => {
                self.reversed = !self.reversed;
                self.rearrange();
            }
            KeyCode::Char('/') => self.mode = Mode::Find(Line::new(&self.find)),
            KeyCode::Char('l') | KeyCode::Enter => self.edit_limits(),
            KeyCode::Char('p') => {
                return self.chosen().map(|vm| Action::PauseOrResume { vm: vm.name.clone() });
            }
            _ => {}
        }
        self.fit(self.page);
        None
    }

    fn order_by(&mut self, step: isize) {
        let at = Column::ALL.iter().position(|&column| column == self.column).unwrap_or(0);
        let count = Column::ALL.len();
        self.column = Column::ALL[at.checked_add_signed(step).map_or(count - 1, |at| at % count)];
        self.reversed = false;
        self.rearrange();
    }

    fn edit_limits(&mut self) {
        let Some(vm) = self.chosen() else { return };
        match vm.memory {
            Some(memory) => {
                let line = Line::new(&written(&memory.limits));
                self.mode = Mode::Limits { vm: vm.name.clone(), now: memory.limits, line };
            }
            None => {
                let text = format!("{} does not answer, so its limits are not known", vm.name);
                self.notice = Some(Notice { text, is_failure: true });
            }
        }
    }
}

/// Limits as `--memory` takes them, with sizes in the largest unit that is exact.
pub fn written(limits: &Limits) -> String {
    format!(
        "{},min={},max={},buffer={}%,weight={}",
        size(limits.startup()),
        size(limits.min()),
        size(limits.max()),
        limits.buffer_percent(),
        limits.weight()
    )
}

fn size(bytes: Bytes) -> String {
    let units = [(1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    let exact = units.into_iter().find(|(unit, _)| bytes.0 > 0 && bytes.0.is_multiple_of(*unit));
    exact.map_or_else(|| bytes.0.to_string(), |(unit, name)| format!("{}{name}", bytes.0 / unit))
}
