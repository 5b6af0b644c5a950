//! Entry point: serves the files below the folder given as argument (`/data` when none is), over TCP and, when a second
//! argument names one, over a serial port.

use std::path::Path;
use std::sync::Arc;

use pageport_guest::serial;
use pageport_guest::server::{Guest, serve};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let data = arguments.next().unwrap_or_else(|| "/data".into());
    let guest = Arc::new(Guest::new(Path::new(&data)));
    if let Some(port) = arguments.next() {
        let port = serial::open(Path::new(&port))?;
        let guest = Arc::clone(&guest);
        // A port that fails ends its thread; TCP goes on.
        std::thread::spawn(move || serial::serve(&guest, port));
    }
    serve(&guest)
}
