use std::io;
use std::path::PathBuf;

/// Why there is no host, or no outcome of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kernel to boot, or one without the module.
    #[error(
        "no kernel with {1} below {0}: install linux-image-cloud-amd64, or unpack it anywhere with \
         `apt-get download` and `dpkg -x` and name the directory"
    )]
    NoKernel(PathBuf, &'static str),
    /// No emulator.
    #[error("{program} can't be run: {source}; install {package} with `sudo apt-get install {package}`")]
    NoEmulator {
        /// Its file's name.
        program: &'static str,
        /// Debian's package.
        package: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Something with files.
    #[error("{what}: {source}")]
    Files {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A command, a file or a host that did not do what it should, in a sentence.
    #[error("{0}")]
    Failed(String),
    /// The user asked to stop.
    #[error("stopped")]
    Stopped,
}

/// Says what a failure was about.
pub(crate) fn files(what: impl ToString) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Files { what: what.to_string(), source }
}
