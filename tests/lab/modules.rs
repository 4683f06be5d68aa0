//! Kernel modules of a Debian kernel, each with what it depends on, in loading order.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A module, ready to be loaded.
pub struct Module {
    /// Its name, with `_` where its file has `-`.
    pub name: String,
    /// The file's contents, uncompressed.
    pub contents: Vec<u8>,
}

/// The modules called `names` and all that they depend on, dependencies first.
/// A name without a file is built into the kernel and left out.
///
/// # Errors
/// Where a file can't be read or unpacked.
pub fn in_order(directory: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    find(directory, &mut files)?;
    let mut order = Vec::new();
    for name in names {
        add(name, &files, &mut order)?;
    }
    Ok(order)
}

fn add(name: &str, files: &HashMap<String, PathBuf>, order: &mut Vec<Module>) -> Result<()> {
    let name = name.replace('-', "_");
    if order.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(path) = files.get(&name) else { return Ok(()) };
    let contents = read(path).with_context(|| format!("{} can't be read", path.display()))?;
    for dependency in depends(&contents) {
        add(&dependency, files, order)?;
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

fn find(directory: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some((name, _)) = name.split_once(".ko")
        {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let contents = fs::read(path)?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(contents);
    }
    let mut unpacked = Vec::new();
    lzma_rs::xz_decompress(&mut contents.as_slice(), &mut unpacked)
        .map_err(|error| anyhow::anyhow!("{error:?}"))?;
    Ok(unpacked)
}
