//! Enums whose values are words on the command line.

/// Implements `ALL`, `word`, `Display` and `FromStr` for an enum, and the error for any other word.
macro_rules! words {
    ($kind:ident, $error:ident: $message:literal, $($variant:ident $word:literal),+ $(,)?) => {
        impl $kind {
            /// All of them.
            pub const ALL: [Self; [$($word),+].len()] = [$(Self::$variant),+];

            /// Its word on the command line.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl std::fmt::Display for $kind {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.word())
            }
        }

        /// A word that names none of them.
        #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
        #[error($message, .0, [$($word),+].join(", "))]
        pub struct $error(String);

        impl std::str::FromStr for $kind {
            type Err = $error;

            fn from_str(text: &str) -> Result<Self, $error> {
                Self::ALL.into_iter().find(|known| known.word() == text).ok_or_else(|| $error(text.to_owned()))
            }
        }
    };
}

pub(crate) use words;
