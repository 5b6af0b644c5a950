//! Where things lie: the repository, its build folder, and the lab's own folder in it.

use std::path::{Path, PathBuf};

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// Cargo's build folder.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Everything that the lab makes: images, runs, figures.
#[must_use]
pub fn lab() -> PathBuf {
    target().join("lab")
}

/// A program of this workspace, as `make` and the tests build it.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    target().join("debug").join(name)
}
