//! Kernel modules, each with what it depends on, in loading order.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;

use crate::Error;
use crate::error::files;

/// A module, ready to be loaded.
pub struct Module {
    /// Its name, with `_` where its file may have `-`.
    pub name: String,
    /// The file's contents, uncompressed.
    pub contents: Vec<u8>,
}

/// The modules called `names` and all that they depend on, dependencies first.
/// A name without a file is built into the kernel and left out.
///
/// # Errors
/// Where a file can't be read or unpacked.
pub fn in_order(directory: &Path, names: &[&str]) -> Result<Vec<Module>, Error> {
    let mut paths = HashMap::new();
    list(directory, &mut paths);
    let mut order = Vec::new();
    for name in names {
        add(name, &paths, &mut order)?;
    }
    Ok(order)
}

/// The file of one module.
pub fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    let mut paths = HashMap::new();
    list(directory, &mut paths);
    paths.remove(name)
}

fn add(name: &str, paths: &HashMap<String, PathBuf>, order: &mut Vec<Module>) -> Result<(), Error> {
    let name = name.replace('-', "_");
    if order.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(path) = paths.get(&name) else { return Ok(()) };
    let contents = read(path).map_err(files(path.display()))?;
    for dependency in depends(&contents) {
        add(&dependency, paths, order)?;
    }
    order.push(Module { name, contents });
    Ok(())
}

/// What the module itself says (`.modinfo`): this needs no `depmod`, which only installing runs.
fn depends(contents: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = contents.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = contents[start + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn list(directory: &Path, paths: &mut HashMap<String, PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            list(&path, paths);
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some((name, _)) = name.split_once(".ko")
        {
            paths.insert(name.replace('-', "_"), path);
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let contents = fs::read(path)?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => {
            let mut unpacked = Vec::new();
            XzReader::new(contents.as_slice(), true).read_to_end(&mut unpacked)?;
            Ok(unpacked)
        }
        Some("ko") => Ok(contents),
        _ => Err(io::Error::other("the lab unpacks modules with .xz, not this kind")),
    }
}
