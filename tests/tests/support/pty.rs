//! A program on a terminal of its own, as a person has it: typed into, its screen read, its terminal's settings looked at.
#![allow(clippy::unwrap_used, dead_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use pageport_lab::lab::Lab;
use tokio::time::{Instant, sleep};

use crate::support::PATIENCE;

const POLL: Duration = Duration::from_millis(50);
/// A key that had no effect for so long is pressed again.
const RETYPE: Duration = Duration::from_secs(2);

/// A program that runs on a terminal.
pub struct Terminal {
    keyboard: File,
    screen: Arc<Mutex<Vec<u8>>>,
    child: Child,
    before: Termios,
}

impl Terminal {
    /// Runs `pageportctl` at site a.
    pub fn ctl(lab: &Lab, arguments: &[&str]) -> Self {
        let ctl = lab.ctl_command("a");
        let ctl = ctl.as_std();
        // A session of its own, whose terminal this is: Ctrl-C would be a signal if the terminal were not raw.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(ctl.get_program()).args(ctl.get_args()).args(arguments);
        command.envs(lab.ctl_environment()).env("TERM", "xterm");
        let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let before = tcgetattr(&pty.master).unwrap();
        let copy = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(copy()).stdout(copy()).stderr(copy());
        let child = command.spawn().unwrap();
        let keyboard = File::from(pty.master);
        let screen = Arc::new(Mutex::new(Vec::new()));
        std::thread::spawn({
            let (mut shown, screen) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
            move || {
                let mut piece = [0; 4096];
                // Reading fails when the last program has left the terminal.
                while let Ok(length @ 1..) = shown.read(&mut piece) {
                    screen.lock().unwrap().extend_from_slice(&piece[..length]);
                }
            }
        });
        Self { keyboard, screen, child, before }
    }

    /// Types.
    pub fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// All that was shown so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits until it shows this.
    pub async fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.screen().contains(text) {
            assert!(Instant::now() < deadline, "waited in vain for {text:?} on the screen:\n{}", self.screen());
            sleep(POLL).await;
        }
    }

    /// Types this again and again until it shows `text`: a key may come before the program that it is for.
    pub async fn type_until(&mut self, keys: &str, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.screen().contains(text) {
            assert!(Instant::now() < deadline, "typed in vain for {text:?}; the screen:\n{}", self.screen());
            self.type_in(keys);
            let shown = Instant::now() + RETYPE;
            while !self.screen().contains(text) && Instant::now() < shown {
                sleep(POLL).await;
            }
        }
    }

    /// Waits until the program has ended; the terminal must be as it was before.
    pub async fn wait_for_end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(tcgetattr(&self.keyboard).unwrap(), self.before, "the terminal was not given back");
                return (status, self.screen());
            }
            assert!(Instant::now() < deadline, "the program does not end; its screen:\n{}", self.screen());
            sleep(POLL).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
