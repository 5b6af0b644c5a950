//! `pageport-keeper`: the parent of one QEMU.

use std::process::ExitCode;

fn main() -> ExitCode {
    pageport_keeper::run(std::env::args_os().skip(1))
}
