//! The keeper's program with plain children instead of QEMU.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageport_keeper::{BootTime, DeadlineFile, Lease};

const KEEPER: &str = env!("CARGO_BIN_EXE_pageport-keeper");
/// A child that does not end by itself while a test runs.
const STAYS: &str = "echo $$ >pid.new; mv pid.new pid; exec sleep 600";
const SOON: Duration = Duration::from_secs(30);
const A_WHILE: Duration = Duration::from_secs(600);

/// A keeper, its deadline file and its child's pid file, in a folder of their own.
struct Kept {
    folder: tempfile::TempDir,
    lease: DeadlineFile,
    keeper: Child,
}

impl Kept {
    fn start(lease: Lease, script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = DeadlineFile::create(&folder.path().join("deadline"), lease).unwrap();
        let keeper = command(folder.path(), script).spawn().unwrap();
        Self { folder, lease: file, keeper }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn child(&self) -> Pid {
        let number = || std::fs::read_to_string(self.path("pid")).ok()?.trim().parse().ok();
        Pid::from_raw(eventually("the child is there", number))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    fn ends(&mut self) -> ExitStatus {
        eventually("the keeper ends", || self.keeper.try_wait().unwrap())
    }

    fn keeper_pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.keeper.id()).unwrap())
    }

    /// Waits until the keeper has surely looked at the lease as it is now: it looks before it sleeps and after.
    fn looked(&self) {
        let looks = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.keeper.id())).unwrap();
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
            line.split_whitespace().last().unwrap().parse::<u64>().unwrap()
        };
        let before = looks();
        eventually("the keeper looks", || (looks() >= before + 2).then_some(()));
    }
}

/// A test that fails leaves no process behind: the child dies with its keeper.
impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn command(folder: &Path, script: &str) -> Command {
    let log = std::fs::File::create(folder.join("log")).unwrap();
    let mut command = Command::new(KEEPER);
    command.arg("--deadline-file").arg(folder.join("deadline")).args(["--", "/bin/sh", "-c", script]);
    command.current_dir(folder).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < give_up, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn from_now(span: Duration) -> Lease {
    Lease::Until(BootTime::now() + span)
}

fn run_to_the_end(folder: &Path) -> Output {
    let mut command = Command::new(KEEPER);
    command.arg("--deadline-file").arg(folder.join("deadline")).args(["--", "/bin/sh", "-c", "touch started"]);
    command.current_dir(folder).output().unwrap()
}

#[test]
fn the_child_is_killed_at_the_deadline_and_not_before() {
    let deadline = BootTime::now() + Duration::from_millis(700);
    let mut kept = Kept::start(Lease::Until(deadline), STAYS);
    let child = kept.child();
    assert_eq!(kept.ends().signal(), Some(Signal::SIGKILL as i32));
    assert!(BootTime::now() >= deadline);
    assert!(!alive(child));
    let expired = kept.lease.expired().unwrap().expect("it says why");
    assert!(expired.deadline == deadline && expired.killed_at >= deadline, "{expired:?}");
    assert!(kept.log().contains("the lease ran out"), "{}", kept.log());
}

#[test]
fn a_child_that_is_stopped_and_deaf_is_killed_all_the_same() {
    let mut kept = Kept::start(Lease::Disarmed, &format!("trap '' TERM INT HUP; {STAYS}"));
    let child = kept.child();
    kill(child, Signal::SIGSTOP).unwrap();
    kept.lease.set_lease(from_now(Duration::from_millis(100))).unwrap();
    assert_eq!(kept.ends().signal(), Some(Signal::SIGKILL as i32));
    assert!(!alive(child));
}

#[test]
fn an_extension_moves_the_deadline_and_its_end_is_met() {
    let first = BootTime::now() + Duration::from_millis(600);
    let mut kept = Kept::start(Lease::Until(first), STAYS);
    let child = kept.child();
    let second = first + Duration::from_millis(900);
    kept.lease.set_lease(Lease::Until(second)).unwrap();
    kept.ends();
    assert!(BootTime::now() >= second && !alive(child));
    assert_eq!(kept.lease.expired().unwrap().unwrap().deadline, second);
}

#[test]
fn a_disarmed_keeper_lets_its_child_live_past_the_old_deadline_until_it_is_armed_again() {
    let deadline = BootTime::now() + Duration::from_millis(600);
    let mut kept = Kept::start(Lease::Until(deadline), STAYS);
    let child = kept.child();
    kept.lease.set_lease(Lease::Disarmed).unwrap();
    eventually("the old deadline passes", || (BootTime::now() > deadline).then_some(()));
    kept.looked();
    assert!(alive(child) && kept.keeper.try_wait().unwrap().is_none());
    // A deadline that is past already.
    kept.lease.set_lease(Lease::Until(deadline)).unwrap();
    assert_eq!(kept.ends().signal(), Some(Signal::SIGKILL as i32));
    assert!(!alive(child));
}

#[test]
fn whatever_becomes_of_the_file_the_deadline_that_was_read_last_stands() {
    type Spoil = fn(&Path);
    let spoilers: [(&str, Spoil); 5] = [
        ("emptied", |path| std::fs::write(path, "").unwrap()),
        ("short", |path| std::fs::write(path, "PPLEASE1").unwrap()),
        ("garbage", |path| std::fs::write(path, [0xa5; 4096]).unwrap()),
        ("deleted", |path| std::fs::remove_file(path).unwrap()),
        ("replaced", |path| {
            std::fs::remove_file(path).unwrap();
            DeadlineFile::create(path, Lease::Disarmed).unwrap();
        }),
    ];
    for (name, spoil) in spoilers {
        let deadline = BootTime::now() + Duration::from_millis(1200);
        let mut kept = Kept::start(Lease::Until(deadline), STAYS);
        let child = kept.child();
        spoil(&kept.path("deadline"));
        kept.looked();
        assert!(alive(child), "{name}: killed before its time");
        assert_eq!(kept.ends().signal(), Some(Signal::SIGKILL as i32), "{name}");
        assert!(BootTime::now() >= deadline && !alive(child), "{name}");

        let mut unlimited = Kept::start(Lease::Disarmed, STAYS);
        let child = unlimited.child();
        spoil(&unlimited.path("deadline"));
        unlimited.looked();
        assert!(alive(child) && unlimited.keeper.try_wait().unwrap().is_none(), "{name}: killed without a deadline");
    }
}

#[test]
fn a_spoilt_file_that_is_mended_counts_again() {
    let mut kept = Kept::start(from_now(A_WHILE), STAYS);
    let child = kept.child();
    std::fs::OpenOptions::new().write(true).open(kept.path("deadline")).unwrap().write_all(b"spoilt").unwrap();
    kept.looked();
    assert!(alive(child) && kept.log().contains("stands as last read"), "{}", kept.log());
    kept.lease.set_lease(from_now(Duration::ZERO)).unwrap();
    kept.ends();
    assert!(!alive(child));
}

#[test]
fn nothing_is_started_under_a_lease_that_is_unreadable_over_or_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deadline");
    let refused = |named: &str| {
        let output = run_to_the_end(folder.path());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(125) && said.contains(named), "{named}: {:?} {said}", output.status);
        assert!(!folder.path().join("started").exists(), "{named}");
    };
    refused("No such file");
    for content in [&b""[..], b"PPLEASE1", &[0xa5; 64]] {
        std::fs::write(&path, content).unwrap();
        refused("no valid lease");
    }
    DeadlineFile::create(&path, from_now(Duration::ZERO)).unwrap();
    refused("ran out before the start");
    let holder = DeadlineFile::create(&path, Lease::Disarmed).unwrap();
    assert!(holder.try_lock().unwrap());
    refused("kept by another keeper");
}

#[test]
fn the_child_dies_with_its_keeper_however_that_dies() {
    for signal in [Signal::SIGKILL, Signal::SIGABRT] {
        let mut kept = Kept::start(Lease::Disarmed, STAYS);
        let child = kept.child();
        kill(kept.keeper_pid(), signal).unwrap();
        assert_eq!(kept.ends().signal(), Some(signal as i32));
        eventually("the child is gone", || (!alive(child)).then_some(()));
    }
}

#[test]
fn a_deadline_holds_though_the_process_that_started_the_keeper_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let deadline = BootTime::now() + Duration::from_millis(2500);
    let lease = DeadlineFile::create(&path("deadline"), Lease::Until(deadline)).unwrap();
    // As a worker does it, through setsid; then the helper is killed with its whole group.
    let script = format!("setsid {KEEPER} --deadline-file deadline -- /bin/sh -c '{STAYS}' & exec sleep 600");
    let mut helper = Command::new("/bin/sh");
    helper.args(["-c", &script]).current_dir(folder.path()).stdin(Stdio::null()).process_group(0);
    let mut helper = helper.spawn().unwrap();
    let number = || std::fs::read_to_string(path("pid")).ok()?.trim().parse().ok();
    let child = Pid::from_raw(eventually("the child is there", number));
    kill(Pid::from_raw(-helper.id().cast_signed()), Signal::SIGKILL).unwrap();
    helper.wait().unwrap();
    assert!(alive(child), "it does not hang on who started it");
    eventually("the child is ended", || (!alive(child)).then_some(()));
    assert!(BootTime::now() >= deadline);
    let word = eventually("the keeper's word", || lease.expired().unwrap());
    assert_eq!(word.deadline, deadline);
}

#[test]
fn signals_that_stop_services_do_not_end_a_guest() {
    let mut kept = Kept::start(Lease::Disarmed, STAYS);
    let child = kept.child();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2] {
        kill(kept.keeper_pid(), signal).unwrap();
    }
    kept.looked();
    assert!(alive(child) && kept.keeper.try_wait().unwrap().is_none());
    // The child itself is free to heed them.
    kill(child, Signal::SIGTERM).unwrap();
    assert_eq!(kept.ends().signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn the_keeper_ends_as_its_child_did() {
    let ended = |script: &str| {
        let mut kept = Kept::start(from_now(A_WHILE), script);
        let status = kept.ends();
        assert_eq!(kept.lease.expired().unwrap(), None, "{script}");
        assert_eq!(kept.log(), "", "{script}");
        let core = std::fs::read_dir(kept.folder.path()).unwrap().flatten();
        assert!(core.into_iter().all(|entry| !entry.file_name().to_string_lossy().contains("core")), "{script}");
        (status.code(), status.signal())
    };
    for code in [0, 1, 3, 255] {
        assert_eq!(ended(&format!("exit {code}")), (Some(code), None));
    }
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGUSR1] {
        assert_eq!(ended(&format!("kill -{} $$", signal as i32)), (None, Some(signal as i32)), "{signal}");
    }
    for signal in [Signal::SIGABRT, Signal::SIGSEGV] {
        assert_eq!(ended(&format!("ulimit -c 0; kill -{} $$", signal as i32)), (None, Some(signal as i32)), "{signal}");
    }
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let folder = tempfile::tempdir().unwrap();
    DeadlineFile::create(&folder.path().join("deadline"), Lease::Disarmed).unwrap();
    for (program, code) in [("/nonexistent/qemu", 127), ("/etc/passwd", 126)] {
        let mut keeper = Command::new(KEEPER);
        keeper.arg("--deadline-file").arg(folder.path().join("deadline")).args(["--", program]);
        let output = keeper.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && said.contains(program), "{said}");
    }
}

#[test]
fn the_child_starts_as_if_there_were_no_keeper() {
    let mut kept = Kept::start(Lease::Disarmed, &format!("env >environment; {STAYS}"));
    let child = kept.child();
    let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap();
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    // Above 31 are the C library's own.
    let standard = (1u64 << 31) - 1;
    assert_eq!((mask("SigBlk:"), mask("SigIgn:") & standard), (0, 0), "{status}");
    let own = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap();
    assert_eq!(std::fs::read_to_string(format!("/proc/{child}/oom_score_adj")).unwrap(), own("oom_score_adj"));
    let files = std::fs::read_dir(format!("/proc/{child}/fd")).unwrap().flatten();
    let files: Vec<PathBuf> = files.filter_map(|file| std::fs::read_link(file.path()).ok()).collect();
    let inherited = |file: &PathBuf| file.ends_with("deadline") || file.to_string_lossy().starts_with("anon_inode");
    assert!(!files.iter().any(inherited), "{files:?}");
    assert!(files.len() >= 3, "{files:?}");
    kill(child, Signal::SIGKILL).unwrap();
    kept.ends();
}

#[test]
fn systemds_watchdog_gets_signs_of_life_that_end_when_the_keeper_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("notify");
    let systemd = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(SOON)).unwrap();
    let lease = DeadlineFile::create(&folder.path().join("deadline"), Lease::Disarmed).unwrap();
    let script = format!("env >environment; {STAYS}");
    let mut command = command(folder.path(), &script);
    command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "1000000");
    let mut kept = Kept { keeper: command.spawn().unwrap(), folder, lease };
    let next = || {
        let mut word = [0; 64];
        let length = systemd.recv(&mut word).expect("a sign of life");
        String::from_utf8_lossy(&word[..length]).into_owned()
    };
    assert_eq!([next(), next(), next()], ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]);
    let child = kept.child();
    assert!(!std::fs::read_to_string(kept.path("environment")).unwrap().contains("WATCHDOG_USEC"));
    kill(kept.keeper_pid(), Signal::SIGSTOP).unwrap();
    eventually("the keeper stands still", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", kept.keeper.id())).unwrap();
        stat.contains(") T ").then_some(())
    });
    systemd.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
    let mut word = [0; 64];
    while systemd.recv(&mut word).is_ok() {}
    // What systemd does then.
    kill(kept.keeper_pid(), Signal::SIGKILL).unwrap();
    kept.ends();
    eventually("the child is gone", || (!alive(child)).then_some(()));
}
