//! One line of text that is being typed.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// The longest line, in characters: far more than any limits need.
const LONGEST: usize = 200;

/// A line and where in it the cursor stands, in characters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    text: Vec<char>,
    cursor: usize,
}

impl Line {
    /// A line that holds `text` already, with the cursor behind it.
    pub fn new(text: &str) -> Self {
        let text: Vec<char> = text.chars().collect();
        Self { cursor: text.len(), text }
    }

    /// What it says.
    pub fn text(&self) -> String {
        self.text.iter().collect()
    }

    /// Where the cursor stands.
    pub const fn cursor(&self) -> usize {
        self.cursor
    }

    /// Takes in a key that changes the line or moves in it; others do nothing.
    pub fn key(&mut self, key: KeyEvent) {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('a') if control => self.cursor = 0,
            KeyCode::Char('e') if control => self.cursor = self.text.len(),
            KeyCode::Char('u') if control => {
                self.text.drain(..self.cursor);
                self.cursor = 0;
            }
            KeyCode::Char(character) if !control && !character.is_control() && self.text.len() < LONGEST => {
                self.text.insert(self.cursor, character);
                self.cursor += 1;
            }
            KeyCode::Backspace if self.cursor > 0 => {
                self.cursor -= 1;
                self.text.remove(self.cursor);
            }
            KeyCode::Delete if self.cursor < self.text.len() => {
                self.text.remove(self.cursor);
            }
            KeyCode::Left => self.cursor = self.cursor.saturating_sub(1),
            KeyCode::Right => self.cursor = (self.cursor + 1).min(self.text.len()),
            KeyCode::Home => self.cursor = 0,
            KeyCode::End => self.cursor = self.text.len(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(line: &mut Line, code: KeyCode) {
        line.key(KeyEvent::new(code, KeyModifiers::NONE));
    }

    #[test]
    fn a_line_is_typed_and_mended() {
        let mut line = Line::new("256M");
        for character in ",maxx".chars() {
            press(&mut line, KeyCode::Char(character));
        }
        press(&mut line, KeyCode::Backspace);
        assert_eq!((line.text().as_str(), line.cursor()), ("256M,max", 8));
        press(&mut line, KeyCode::Home);
        press(&mut line, KeyCode::Backspace);
        press(&mut line, KeyCode::Delete);
        press(&mut line, KeyCode::Char('1'));
        press(&mut line, KeyCode::Left);
        press(&mut line, KeyCode::Left);
        press(&mut line, KeyCode::Right);
        press(&mut line, KeyCode::Tab);
        assert_eq!((line.text().as_str(), line.cursor()), ("156M,max", 1));
        line.key(KeyEvent::new(KeyCode::Char('u'), KeyModifiers::CONTROL));
        assert_eq!((line.text().as_str(), line.cursor()), ("56M,max", 0));
        for _ in 0..1000 {
            press(&mut line, KeyCode::Char('ä'));
        }
        assert_eq!(line.text().chars().count(), LONGEST);
    }
}
