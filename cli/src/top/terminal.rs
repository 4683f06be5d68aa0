//! The terminal: threads that hear keys and ask for news, and the loop that draws.
//!
//! Whatever ends it, the terminal is as it was before: the end of the loop, a signal,
//! an error, and a panic in any thread.

use std::io::{self, Write};
use std::panic;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use balancer::daemon::signals::Inherited;
use ratatui::DefaultTerminal;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event as Key, KeyEventKind};
use ratatui::crossterm::execute;
use tokio::runtime::Runtime;
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{MissedTickBehavior, interval};

use super::draw;
use super::gather::Gatherer;
use super::snapshot::Snapshot;
use super::view::{Action, View};
use crate::client;
use crate::failure::Failure;

/// What the loop waits for.
enum Event {
    /// A key, or another size of the terminal.
    Terminal(Key),
    /// How things stand.
    News(Result<Snapshot, String>),
    /// What came of an action.
    Done(Result<String, String>),
    /// Somebody wants this to end, or a thread of it has.
    End(Result<(), String>),
}

/// Shows `view` and lets keys steer it until it is left.
///
/// # Errors
/// The terminal or an event loop can't be had, or the terminal went away.
pub fn run(mut view: View, directory: PathBuf, pause: Duration) -> Result<(), Failure> {
    let (sender, events) = mpsc::channel();
    let (actions, wanted) = unbounded_channel();
    let runtime = client::event_loop()?;
    let mut screen = Screen::enter()?;
    spawn(&sender, "news", move |sender| gather(&runtime, directory, pause, wanted, sender))?;
    spawn(&sender, "keys", hear)?;
    let result = screen.show(&mut view, &events, &actions);
    drop(screen);
    result
}

/// A thread whose end, in whatever way, is an event too.
fn spawn(
    sender: &Sender<Event>,
    name: &str,
    work: impl FnOnce(&Sender<Event>) -> Result<(), String> + Send + 'static,
) -> Result<(), Failure> {
    /// Sends the end when it goes, also in a panic.
    struct Last(Sender<Event>);
    impl Drop for Last {
        fn drop(&mut self) {
            let _ = self.0.send(Event::End(Err("a thread of it broke".to_owned())));
        }
    }
    let last = Last(sender.clone());
    let work = move || {
        let result = work(&last.0);
        // Of two ends the first one counts.
        let _ = last.0.send(Event::End(result));
    };
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map(drop).map_err(|error| Failure::new(format!("can't start a thread: {error}")))
}

/// Sends keys and changes of size.
fn hear(sender: &Sender<Event>) -> Result<(), String> {
    loop {
        let event = event::read().map_err(|error| format!("the terminal went away: {error}"))?;
        if sender.send(Event::Terminal(event)).is_err() {
            return Ok(());
        }
    }
}

/// Sends news after each `pause`, carries actions out, and ends when a signal asks for it.
fn gather(
    runtime: &Runtime,
    directory: PathBuf,
    pause: Duration,
    mut wanted: UnboundedReceiver<Action>,
    sender: &Sender<Event>,
) -> Result<(), String> {
    runtime.block_on(async {
        let handler =
            |kind| Inherited::take(kind).map_err(|error| format!("can't listen for signals: {error}"));
        let mut interrupt = handler(SignalKind::interrupt())?;
        let mut terminate = handler(SignalKind::terminate())?;
        let mut hangup = handler(SignalKind::hangup())?;
        let mut gatherer = Gatherer::new(directory);
        let mut ticks = interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let work = async {
            loop {
                let event = tokio::select! {
                    biased;
                    action = wanted.recv() => match action {
                        Some(Action::SetLimits { vm, limits }) => {
                            Event::Done(gatherer.set_limits(&vm, limits).await)
                        }
                        Some(Action::PauseOrResume { vm }) => {
                            Event::Done(gatherer.pause_or_resume(&vm).await)
                        }
                        // The loop's own business.
                        Some(Action::Quit | Action::Suspend) => continue,
                        None => return,
                    },
                    _ = ticks.tick() => Event::News(gatherer.gather().await),
                };
                let acted = matches!(event, Event::Done(_));
                if sender.send(event).is_err() {
                    return;
                }
                if acted {
                    ticks.reset_immediately();
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = interrupt.received() => {}
            () = terminate.received() => {}
            () = hangup.received() => {}
        }
        Ok(())
    })
}

/// The terminal while it is ours. It is given back when this goes.
struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    fn enter() -> Result<Self, Failure> {
        let terminal = ratatui::try_init()
            .map_err(|error| Failure::new(format!("can't use this terminal: {error}; try --once")))?;
        // The one that is set by now gives back all but the cursor.
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            give_back();
            before(info);
        }));
        Ok(Self { terminal })
    }

    fn show(
        &mut self,
        view: &mut View,
        events: &Receiver<Event>,
        actions: &UnboundedSender<Action>,
    ) -> Result<(), Failure> {
        self.draw(view)?;
        while let Ok(event) = events.recv() {
            match event {
                Event::Terminal(Key::Key(key)) if key.kind != KeyEventKind::Release => match view.key(key) {
                    Some(Action::Quit) => return Ok(()),
                    Some(Action::Suspend) => self.suspend()?,
                    // Where nobody takes it any more, the end is on its way.
                    Some(action) => drop(actions.send(action)),
                    None => {}
                },
                Event::Terminal(_) => {}
                Event::News(news) => view.take(news),
                Event::Done(outcome) => view.done(outcome),
                Event::End(result) => return result.map_err(Failure::new),
            }
            self.draw(view)?;
        }
        Ok(())
    }

    fn draw(&mut self, view: &mut View) -> Result<(), Failure> {
        let drawn = self.terminal.draw(|frame| {
            let area = frame.area();
            view.fit(draw::page(area.height));
            if let Some(cursor) = draw::draw(view, area, frame.buffer_mut()) {
                frame.set_cursor_position(cursor);
            }
        });
        drawn.map(drop).map_err(|error| Failure::new(format!("the terminal went away: {error}")))
    }

    /// Lets the shell have the terminal until it continues this process.
    fn suspend(&mut self) -> Result<(), Failure> {
        give_back();
        // SAFETY: raises a signal in this process; its default action stops it until SIGCONT.
        unsafe { libc::raise(libc::SIGTSTP) };
        self.terminal = ratatui::try_init()
            .map_err(|error| Failure::new(format!("can't use this terminal any more: {error}")))?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// The terminal as it was. One that has gone needs nothing.
fn give_back() {
    let _ = ratatui::try_restore();
    let mut out = io::stdout();
    let _ = execute!(out, Show);
    let _ = out.flush();
}
