//! From a bzImage to an unpacked kernel, by way of the cache.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::PathBuf;

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cache::{Cache, Lock};
use crate::helper::{Helper, TIME_LIMIT};
use crate::kernel::header::{HEAD, SetupHeader};
use crate::kernel::prepared::{self, Key, PreparedKernel};

/// How kernels are unpacked on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unpacking {
    /// Who does it.
    pub helper: Helper,
    /// The directory in which they are kept, if they are.
    pub cache: Option<PathBuf>,
}

/// Where an unpacked kernel comes from.
#[derive(Debug)]
pub enum Origin {
    /// It was unpacked before.
    Cache,
    /// It was unpacked now, and is kept where there is a cache.
    Unpacked,
    /// It was unpacked now, and could not be kept.
    NotKept(Error),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cache => f.write_str("it was kept from an earlier start"),
            Self::Unpacked => f.write_str("it was unpacked just now"),
            Self::NotKept(why) => write!(f, "it was unpacked just now, and is not kept: {why}"),
        }
    }
}

impl Unpacking {
    /// The kernel in a bzImage, unpacked.
    ///
    /// # Errors
    /// [`Error`] says why there is none. The bzImage may be as good as any, and unpack itself.
    pub fn prepare(&self, image: &File) -> Result<(PreparedKernel, Origin), Error> {
        let mut image = image;
        image.rewind().map_err(Error::Read)?;
        let mut head = Vec::new();
        image.take(HEAD as u64).read_to_end(&mut head).map_err(Error::Read)?;
        let header = SetupHeader::parse(&head)?;
        let key = prepared::key(&mut image).map_err(Error::Read)?;
        let opened = self.cache.as_deref().map(Cache::open).transpose();
        let not_kept = match opened {
            Ok(None) => return Ok((self.unpack(image, &header, &key)?, Origin::Unpacked)),
            Ok(Some(cache)) => {
                if let Some(kernel) = cache.get(&key) {
                    return Ok((kernel, Origin::Cache));
                }
                match cache.lock() {
                    Ok(lock) => match self.unpack_and_keep(image, &header, &key, &cache, &lock) {
                        Err(error @ (Error::Cache { .. } | Error::Write(_) | Error::Prepared(_))) => error,
                        done => return done,
                    },
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        Ok((self.unpack(image, &header, &key)?, Origin::NotKept(not_kept)))
    }

    fn unpack_and_keep(
        &self,
        image: &File,
        header: &SetupHeader,
        key: &Key,
        cache: &Cache,
        lock: &Lock,
    ) -> Result<(PreparedKernel, Origin), Error> {
        // Another VM may have unpacked it meanwhile.
        if let Some(kernel) = cache.get(key) {
            return Ok((kernel, Origin::Cache));
        }
        cache.sweep(lock)?;
        let file = cache.start(lock)?;
        self.helper.unpack(image, header, file.as_file(), TIME_LIMIT)?;
        let kernel = PreparedKernel::open(file.reopen().map_err(Error::Read)?, key)?;
        match cache.keep(key, file, lock) {
            Ok(()) => Ok((kernel, Origin::Unpacked)),
            Err(error) => Ok((kernel, Origin::NotKept(error))),
        }
    }

    /// Unpacks into memory.
    fn unpack(&self, image: &File, header: &SetupHeader, key: &Key) -> Result<PreparedKernel, Error> {
        let file = rustix::fs::memfd_create(c"kernel", MemfdFlags::CLOEXEC);
        let file = File::from(file.map_err(|error| Error::Write(error.into()))?);
        self.helper.unpack(image, header, &file, TIME_LIMIT)?;
        PreparedKernel::open(file, key)
    }
}
