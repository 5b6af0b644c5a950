//! Entry point: serves the files below the folder given as argument (`/data` when none is), over TCP and, when a second
//! argument names one, over a serial port. `PAGEPORT_HEARTBEAT=ADDRESS,PERIOD_MS` has it beat as well.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pageport_guest::server::{Guest, serve};
use pageport_guest::{heartbeat, serial};

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
    if let Ok(wanted) = std::env::var("PAGEPORT_HEARTBEAT") {
        let (to, period_ms) = wanted.split_once(',').ok_or(std::io::ErrorKind::InvalidInput)?;
        let to = to.parse().map_err(std::io::Error::other)?;
        let period = Duration::from_millis(period_ms.parse().map_err(std::io::Error::other)?);
        std::thread::spawn(move || heartbeat::beat(to, period));
    }
    serve(&guest)
}
