//! A kernel as packages install it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::modules::{self, Module};
use crate::{Error, Vendor};

/// A kernel's image, and the directory of its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledKernel {
    /// The image.
    pub image: PathBuf,
    modules: PathBuf,
}

impl InstalledKernel {
    /// The first kernel below `root` (in `boot` and `lib/modules`) that has KVM for such a
    /// processor; Debian's cloud kernels before others, older before newer: counts are compared
    /// with those of 6.1.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn find(root: &Path, vendor: Vendor) -> Result<Self, Error> {
        let none = || Error::NoKernel(root.to_owned(), vendor.module());
        let mut releases: Vec<String> = fs::read_dir(root.join("lib/modules"))
            .map_err(|_| none())?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        releases.sort_by_key(|release| (!release.contains("cloud"), numbers(release)));
        let kernels = releases.into_iter().map(|release| Self {
            image: root.join("boot").join(format!("vmlinuz-{release}")),
            modules: root.join("lib/modules").join(release).join("kernel"),
        });
        let has_kvm = |kernel: &Self| modules::find(&kernel.modules, vendor.module()).is_some();
        kernels.into_iter().find(|kernel| kernel.image.is_file() && has_kvm(kernel)).ok_or_else(none)
    }

    /// Its modules called `names` with what they depend on, in loading order.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<Module>, Error> {
        modules::in_order(&self.modules, names)
    }
}

/// The numbers in a name, so that 6.12 comes after 6.1.
pub(crate) fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(root: &Path, release: &str, module: &str) {
        let module = root.join("lib/modules").join(release).join("kernel/arch/x86/kvm").join(module);
        for file in [module, root.join("boot").join(format!("vmlinuz-{release}"))] {
            fs::create_dir_all(file.parent().expect("a parent")).expect("directories");
            fs::write(file, "").expect("a file");
        }
    }

    #[test]
    fn the_oldest_cloud_kernel_with_the_processors_module_is_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        assert!(matches!(InstalledKernel::find(root, Vendor::Amd), Err(Error::NoKernel(..))));
        for release in ["6.12.1+deb12-cloud-amd64", "6.1.0-9-cloud-amd64", "5.0.0-amd64"] {
            install(root, release, "kvm-amd.ko");
        }
        install(root, "6.0.0-cloud-amd64", "kvm-intel.ko.xz");
        let amd = InstalledKernel::find(root, Vendor::Amd).expect("a kernel");
        assert!(amd.image.ends_with("boot/vmlinuz-6.1.0-9-cloud-amd64"), "{amd:?}");
        let intel = InstalledKernel::find(root, Vendor::Intel).expect("a kernel");
        assert!(intel.image.ends_with("boot/vmlinuz-6.0.0-cloud-amd64"), "{intel:?}");
        fs::remove_file(&intel.image).expect("it was there");
        let why = InstalledKernel::find(root, Vendor::Intel).expect_err("no image").to_string();
        assert!(why.contains("kvm_intel"), "{why}");
    }
}
