//! Entry point: serves the files below the folder given as argument (`/data` when none is).

use std::path::Path;

use pageport_guest::server::{Guest, serve};

fn main() -> std::io::Result<()> {
    let data = std::env::args_os().nth(1).unwrap_or_else(|| "/data".into());
    serve(Guest::new(Path::new(&data)))
}
