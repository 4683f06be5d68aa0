//! From keys and news to frames, without a terminal.

use api::units::Bytes;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::column::Column;
use super::snapshot::{Condition, Snapshot, Source, Vm};
use super::testing::{balanced, many, vm};
use super::view::{Action, View};
use super::{draw, picture};

/// A screen of its own for a view, as `terminal` drives the real one.
struct Screen {
    terminal: Terminal<TestBackend>,
    view: View,
}

impl Screen {
    fn new(width: u16, height: u16, snapshot: Snapshot) -> Self {
        let mut view = View::new(Column::Used, false);
        view.take(Ok(snapshot));
        Self { terminal: Terminal::new(TestBackend::new(width, height)).unwrap(), view }
    }

    fn lines(&mut self) -> Vec<String> {
        let view = &mut self.view;
        let drawn = self.terminal.draw(|frame| {
            view.fit(draw::page(frame.area().height));
            if let Some(cursor) = draw::draw(view, frame.area(), frame.buffer_mut()) {
                frame.set_cursor_position(cursor);
            }
        });
        let buffer = drawn.unwrap().buffer;
        let width = usize::from(buffer.area.width).max(1);
        let lines = buffer.content.chunks(width);
        lines.map(|cells| cells.iter().map(|cell| cell.symbol()).collect()).collect()
    }

    fn text(&mut self) -> String {
        self.lines().join("\n")
    }

    fn key(&mut self, code: KeyCode) -> Option<Action> {
        self.view.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    fn type_text(&mut self, text: &str) {
        for character in text.chars() {
            assert_eq!(self.key(KeyCode::Char(character)), None);
        }
    }

    fn chosen(&self) -> &str {
        &self.view.chosen().expect("a VM is chosen").name
    }
}

fn alone(vms: Vec<Vm>) -> Snapshot {
    let mut snapshot = balanced(vms);
    snapshot.source = Source::Vms { because: "no balancer runs".to_owned() };
    snapshot.host.budget = None;
    snapshot
}

#[test]
fn a_small_screen_tells_host_vms_and_the_reason() {
    let mut screen = Screen::new(80, 24, balanced(vec![vm("web", 300, 512), vm("db", 700, 1024)]));
    let lines = screen.lines();
    assert_eq!(lines.len(), 24);
    assert!(lines[0].starts_with("ballast top   2 VMs   host normal   balancer's round 7"), "{}", lines[0]);
    assert!(lines[1].contains("32 GiB of 64 GiB used"), "{}", lines[1]);
    assert!(lines[2].contains("31 GiB of 62 GiB given, 31 GiB free"), "{}", lines[2]);
    let titles: Vec<&str> = lines[3].split_whitespace().collect();
    assert_eq!(titles, ["NAME", "STATE", "USED", "ACTUAL", "TARGET", "MAX", "USED,", "LATELY"]);
    assert!(lines[4].starts_with("db             following      700 MiB    1 GiB    1 GiB    8 GiB"));
    assert!(lines[4].contains('▆'), "no history in {}", lines[4]);
    assert!(lines[5].starts_with("web"), "{}", lines[5]);
    let foot = lines[18..].join(" ");
    assert!(foot.contains("db: 256M,min=128M,max=8G,buffer=20%,weight=100"), "{foot}");
    assert!(foot.contains("grow 128 MiB -> 1 GiB, it needs more and memory is free"), "{foot}");
    assert!(foot.contains("? help") && foot.contains("p pause"), "{foot}");
}

#[test]
fn two_hundred_vms_are_scrolled_through_and_each_can_be_reached() {
    let mut screen = Screen::new(80, 24, balanced(many(200)));
    assert!(screen.text().contains("200 VMs, 1-14 shown"));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let chosen = screen.chosen().to_owned();
        assert!(screen.text().contains(&chosen), "{chosen} is chosen and not on the screen");
        seen.insert(chosen);
        screen.key(KeyCode::Down);
    }
    assert_eq!(seen.len(), 200);
    assert_eq!(screen.chosen(), "vm-000", "the least used is last");
    assert!(screen.text().contains("187-200 shown"));
    screen.key(KeyCode::PageUp);
    screen.key(KeyCode::Home);
    assert_eq!(screen.chosen(), "vm-199");
    screen.key(KeyCode::End);
    // A larger terminal shows more of them; a smaller one keeps the chosen one.
    screen.terminal.backend_mut().resize(120, 60);
    assert!(screen.text().contains("151-200 shown"));
    screen.terminal.backend_mut().resize(80, 12);
    assert!(screen.text().contains("199-200 shown"));
    assert!(screen.text().contains("vm-000"));
}

#[test]
fn no_size_breaks_it() {
    for width in [0, 1, 2, 39, 40, 41, 79, 80, 133, 300] {
        for height in [0, 1, 2, 9, 10, 11, 24, 100] {
            for keys in ["", "?", "l", "/abc"] {
                let mut screen = Screen::new(width, height, balanced(many(30)));
                for key in keys.chars() {
                    screen.key(KeyCode::Char(key));
                }
                screen.lines();
            }
        }
    }
    assert!(Screen::new(30, 8, balanced(many(3))).text().contains("needs 40 x 10"));
}

#[test]
fn a_wide_screen_tells_more() {
    let mut screen = Screen::new(160, 24, balanced(many(3)));
    let titles = &screen.lines()[3];
    for title in ["HOST", "WANTS", "MAY HAVE", "MIN", "WEIGHT", "REPORT", "HUGE"] {
        assert!(titles.contains(title), "{title} is missing in {titles}");
    }
}

#[test]
fn the_order_is_chosen_and_the_chosen_vm_stays_so() {
    let vms = vec![vm("a", 100, 900), vm("b", 300, 500), vm("c", 200, 700)];
    let mut screen = Screen::new(80, 24, balanced(vms));
    let order = |screen: &mut Screen| {
        let lines = screen.lines();
        lines[4..7].iter().map(|line| line.chars().next().unwrap()).collect::<String>()
    };
    assert_eq!(order(&mut screen), "bca");
    assert_eq!(screen.chosen(), "b");
    screen.key(KeyCode::Right);
    assert_eq!(order(&mut screen), "acb");
    assert_eq!(screen.chosen(), "b", "it moved, and is still the chosen one");
    screen.key(KeyCode::Char('r'));
    assert_eq!(order(&mut screen), "bca");
    for _ in 0..Column::ALL.len() {
        screen.key(KeyCode::Left);
    }
    assert_eq!(order(&mut screen), "acb", "once around, and the usual way again");
}

#[test]
fn trouble_comes_first_when_ordered_by_state() {
    let mut ill = vm("z", 1, 2);
    ill.condition = Condition::NotAnswering;
    ill.memory = None;
    let mut screen = Screen::new(80, 24, balanced(vec![vm("a", 1, 2), ill]));
    screen.key(KeyCode::Left);
    assert!(screen.lines()[4].starts_with("z              not answering"));
    screen.key(KeyCode::Home);
    screen.key(KeyCode::Char('l'));
    assert!(screen.text().contains("does not answer, so its limits are not known"));
}

#[test]
fn names_are_found() {
    let mut screen = Screen::new(80, 24, balanced(many(200)));
    screen.key(KeyCode::Char('/'));
    screen.type_text("19");
    assert!(screen.text().contains("find: 19"));
    screen.key(KeyCode::Enter);
    // 019, 119, and 190 to 199.
    assert!(screen.text().contains("12 of 200 VMs with `19`"), "{}", screen.text());
    assert_eq!(screen.key(KeyCode::Esc), None, "the first Esc shows all again");
    assert!(screen.text().contains("200 VMs, "));
    assert_eq!(screen.key(KeyCode::Esc), Some(Action::Quit));
}

#[test]
fn limits_are_edited_with_a_judge_beside() {
    let mut screen = Screen::new(80, 24, balanced(vec![vm("web", 300, 512)]));
    screen.key(KeyCode::Char('l'));
    let text = screen.text();
    assert!(text.contains("New limits of web") && text.contains("as they are now"), "{text}");
    screen.type_text("0");
    assert!(screen.text().contains("between 128 MiB and 8 GiB, 20% spare"), "{}", screen.text());
    screen.type_text("0");
    assert!(screen.text().contains("weight=10000") && !screen.text().contains("out of range"));
    screen.type_text("0");
    assert!(screen.text().contains("weight=100000 is out of range"), "{}", screen.text());
    assert_eq!(screen.key(KeyCode::Enter), None, "what is wrong is not set");
    for _ in 0..3 {
        screen.key(KeyCode::Backspace);
    }
    let limits = "256M,min=128M,max=8G,buffer=20%,weight=100".parse().unwrap();
    assert_eq!(screen.key(KeyCode::Enter), Some(Action::SetLimits { vm: "web".to_owned(), limits }));
    screen.view.done(Err("the VM refused it".to_owned()));
    assert!(screen.text().contains("the VM refused it"));
    screen.key(KeyCode::Char('l'));
    assert_eq!(screen.key(KeyCode::Esc), None);
    assert!(screen.text().contains("? help"));
}

#[test]
fn keys_lead_in_and_out() {
    let mut screen = Screen::new(80, 24, balanced(vec![vm("web", 300, 512)]));
    screen.key(KeyCode::Char('?'));
    let text = screen.text();
    assert!(text.contains("any key goes back") && text.contains("what the balancer would let"), "{text}");
    assert!(text.contains("it had in that time."), "the help does not fit 80 x 24: {text}");
    assert_eq!(screen.key(KeyCode::Char('q')), None);
    assert_eq!(screen.key(KeyCode::Char('p')), Some(Action::PauseOrResume { vm: "web".to_owned() }));
    assert_eq!(screen.key(KeyCode::Char('q')), Some(Action::Quit));
    for (key, action) in [('c', Action::Quit), ('z', Action::Suspend)] {
        screen.key(KeyCode::Char('l'));
        let pressed = KeyEvent::new(KeyCode::Char(key), KeyModifiers::CONTROL);
        assert_eq!(screen.view.key(pressed), Some(action), "also in the middle of a line");
    }
}

#[test]
fn a_balancer_that_goes_is_said_to_have_gone() {
    let mut screen = Screen::new(80, 24, balanced(vec![vm("web", 300, 512)]));
    let mut web = vm("web", 300, 512);
    web.reason = None;
    screen.view.take(Ok(alone(vec![web])));
    let text = screen.text();
    assert!(text.contains("no balancer runs: VMs asked directly"), "{text}");
    assert!(text.contains("held by the host for them"), "{text}");
    assert!(text.contains("no balancer runs, so nobody changes its target"), "{text}");
    screen.view.take(Err("cannot use the runtime directory".to_owned()));
    let text = screen.text();
    assert!(text.contains("cannot use the runtime directory") && text.contains("web"), "{text}");
    screen.view.take(Ok(balanced(Vec::new())));
    assert!(screen.text().contains("no VMs: `ballast run` starts one"));
    assert_eq!(screen.key(KeyCode::Char('p')), None, "there is none to pause");
    screen.key(KeyCode::Down);
    screen.key(KeyCode::End);
    assert!(screen.view.chosen().is_none());
}

#[test]
fn what_is_over_or_short_is_said() {
    let mut snapshot = balanced(many(1));
    let budget = snapshot.host.budget.as_mut().unwrap();
    budget.unserved = Bytes::mib(300);
    assert!(Screen::new(80, 24, snapshot.clone()).text().contains("31 GiB free, 300 MiB short"));
    snapshot.host.budget.as_mut().unwrap().over = Bytes::mib(20);
    assert!(Screen::new(80, 24, snapshot).text().contains("20 MiB OVER"));
}

#[test]
fn one_picture_tells_every_vm_and_its_reason() {
    let text = picture(View::new(Column::Name, false), balanced(many(200)), 80);
    assert_eq!(text.lines().count(), usize::from(draw::HEAD) + 200 + 200, "{text}");
    assert!(text.contains("\nvm-137         following"), "{text}");
    assert!(text.contains("\nvm-137: last decision: grow 128 MiB -> 512 MiB"), "{text}");
    assert!(!text.contains('\x1b'));
    let none = picture(View::new(Column::Name, false), balanced(Vec::new()), 80);
    assert!(none.contains("no VMs"), "{none}");
}
