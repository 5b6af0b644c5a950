//! The guard's program over real keepers with plain children instead of QEMU.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageport_keeper::heartbeat::is_guarded;
use pageport_keeper::{BootTime, DeadlineFile, Lease};

const KEEPER: &str = env!("CARGO_BIN_EXE_pageport-keeper");
const STAYS: &str = "echo $$ >pid.new; mv pid.new pid; exec sleep 600";
const SOON: Duration = Duration::from_secs(30);
const A_WHILE: Duration = Duration::from_secs(600);

/// A runtime folder as a worker has it, and what the test started there. Nothing of it outlives the test.
struct Host {
    folder: tempfile::TempDir,
    started: Vec<Child>,
}

/// One VM of it.
struct Kept {
    lease: DeadlineFile,
    keeper: Pid,
    child: Pid,
}

impl Host {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), started: vec![] }
    }

    fn runtime_dir(&self) -> &Path {
        self.folder.path()
    }

    fn vm(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().join("vm").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn start(&mut self, command: &mut Command) -> Pid {
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        self.started.push(child);
        pid
    }

    fn guard(&mut self) -> Pid {
        let mut command = Command::new(KEEPER);
        command.arg("guard").arg("--runtime-dir").arg(self.folder.path());
        let guard = self.start(&mut command);
        eventually("the guard lives", || is_guarded(self.runtime_dir()).then_some(()));
        guard
    }

    fn keep(&mut self, name: &str, lease: Lease) -> Kept {
        let folder = self.vm(name);
        let file = DeadlineFile::create(&folder.join("deadline"), lease).unwrap();
        let mut command = Command::new(KEEPER);
        command.arg("--deadline-file").arg(folder.join("deadline")).args(["--", "/bin/sh", "-c", STAYS]);
        let keeper = self.start(command.current_dir(&folder));
        Kept { lease: file, keeper, child: pid_in(&folder.join("pid")) }
    }

    /// Ended and waited for, so that its number may be given to another.
    fn reap(&mut self, pid: Pid) {
        let child = self.started.iter_mut().find(|child| child.id().cast_signed() == pid.as_raw()).unwrap();
        eventually("the process ends", || child.try_wait().unwrap());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in &mut self.started {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn pid_in(file: &Path) -> Pid {
    let number = || std::fs::read_to_string(file).ok()?.trim().parse().ok();
    Pid::from_raw(eventually("the child is there", number))
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

fn state(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn alive(pid: Pid) -> bool {
    state(pid).is_some_and(|state| !['Z', 'X'].contains(&state))
}

fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    eventually("it stands still", || (state(pid) == Some('T')).then_some(()));
}

fn ended(pid: Pid) {
    eventually("the child is ended", || (!alive(pid)).then_some(()));
}

fn from_now(span: Duration) -> Lease {
    Lease::Until(BootTime::now() + span)
}

#[test]
fn what_a_stopped_keeper_should_have_ended_is_ended_and_nothing_else() {
    let mut host = Host::new();
    host.guard();
    let deadline = BootTime::now() + Duration::from_millis(3000);
    let late = host.keep("late", Lease::Until(deadline));
    let extended = host.keep("extended", Lease::Until(deadline));
    let unlimited = host.keep("unlimited", Lease::Disarmed);
    for kept in [&late, &extended, &unlimited] {
        stop(kept.keeper);
    }
    extended.lease.set_lease(from_now(A_WHILE)).unwrap();
    ended(late.child);
    assert!(BootTime::now() >= deadline, "ended before its time");
    let word = eventually("the word why", || late.lease.expired().unwrap());
    assert!(word.deadline == deadline && word.killed_at >= deadline, "{word:?}");
    // The keeper would hold the VM's place for as long as it stands still.
    host.reap(late.keeper);
    assert!(late.lease.try_lock().unwrap());
    for kept in [&extended, &unlimited] {
        assert!(alive(kept.child) && alive(kept.keeper));
        assert_eq!(kept.lease.expired().unwrap(), None);
    }
}

#[test]
fn a_guard_that_was_killed_goes_on_when_it_is_started_again() {
    let mut host = Host::new();
    let guard = host.guard();
    let deadline = BootTime::now() + Duration::from_millis(3000);
    let kept = host.keep("one", Lease::Until(deadline));
    stop(kept.keeper);
    kill(guard, Signal::SIGKILL).unwrap();
    host.reap(guard);
    eventually("nobody guards", || (!is_guarded(host.runtime_dir())).then_some(()));
    eventually("the deadline passes", || (BootTime::now() > deadline).then_some(()));
    assert!(alive(kept.child), "there is nobody who could have ended it");
    host.guard();
    ended(kept.child);
}

#[test]
fn a_guard_that_is_stopped_does_not_count_as_one_and_a_second_one_is_refused() {
    let mut host = Host::new();
    let guard = host.guard();
    let mut second = Command::new(KEEPER);
    let output = second.arg("guard").arg("--runtime-dir").arg(host.runtime_dir()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("another guard"), "{said}");
    stop(guard);
    eventually("nobody guards", || (!is_guarded(host.runtime_dir())).then_some(()));
    kill(guard, Signal::SIGCONT).unwrap();
    eventually("it guards again", || is_guarded(host.runtime_dir()).then_some(()));
    // Its file is gone, so nobody would know any more that it lives: it ends, to be started again.
    std::fs::remove_file(host.runtime_dir().join("guard")).unwrap();
    host.reap(guard);
    host.guard();
}

#[test]
fn files_that_are_garbage_hide_no_deadline_that_was_read_before_nor_those_of_others() {
    let mut host = Host::new();
    host.guard();
    std::fs::create_dir_all(host.vm("a-folder").join("deadline")).unwrap();
    std::fs::write(host.vm("garbage").join("deadline"), [0xa5; 4096]).unwrap();
    std::fs::write(host.vm("cut").join("deadline"), "PPLEASE1").unwrap();
    std::fs::write(host.folder.path().join("vm/no-folder"), "").unwrap();
    let deadline = BootTime::now() + Duration::from_millis(4000);
    let kept = ["emptied", "spoilt"].map(|name| host.keep(name, Lease::Until(deadline)));
    let other = host.keep("other", Lease::Until(deadline));
    for kept in kept.iter().chain([&other]) {
        stop(kept.keeper);
    }
    // The guard has surely read them: a look that begins after this sees all of them.
    let read = BootTime::now() + Duration::from_millis(500);
    eventually("the guard looks", || (BootTime::now() > read && is_guarded(host.runtime_dir())).then_some(()));
    std::fs::write(host.vm("emptied").join("deadline"), "").unwrap();
    std::fs::write(host.vm("spoilt").join("deadline"), [0x5a; 64]).unwrap();
    for kept in kept.iter().chain([&other]) {
        ended(kept.child);
    }
    assert!(BootTime::now() >= deadline);
    assert!(is_guarded(host.runtime_dir()));
}

#[test]
fn a_process_that_only_looks_like_it_is_never_hit() {
    let mut host = Host::new();
    host.guard();
    let folder = host.vm("one");
    let file = folder.join("deadline");
    // The number in the pid file has gone to another process, and another names the file as QEMU might.
    let stranger = host.start(Command::new("/bin/sleep").arg("600"));
    let namesake = Command::new("/bin/sh")
        .args(["-c", "sleep 600 & echo $! >grandchild.new; mv grandchild.new grandchild; wait", "--"])
        .arg("--deadline-file")
        .arg(&file)
        .current_dir(&folder)
        .spawn()
        .unwrap();
    let named = Pid::from_raw(namesake.id().cast_signed());
    host.started.push(namesake);
    let grandchild = pid_in(&folder.join("grandchild"));
    let kept = host.keep("one", from_now(Duration::from_millis(1500)));
    std::fs::write(folder.join("pid"), stranger.to_string()).unwrap();
    stop(kept.keeper);
    ended(kept.child);
    host.reap(kept.keeper);
    for other in [stranger, named, grandchild] {
        assert!(alive(other), "{other} was hit");
    }
    kill(grandchild, Signal::SIGKILL).unwrap();
}

#[test]
fn systemds_watchdog_gets_signs_of_life_until_the_guard_is_stopped() {
    let mut host = Host::new();
    let socket = host.folder.path().join("notify");
    let systemd = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(SOON)).unwrap();
    let mut command = Command::new(KEEPER);
    command.arg("guard").arg("--runtime-dir").arg(host.runtime_dir());
    command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "1000000");
    let guard = host.start(&mut command);
    let next = || {
        let mut word = [0; 64];
        let length = systemd.recv(&mut word).expect("a sign of life");
        String::from_utf8_lossy(&word[..length]).into_owned()
    };
    assert_eq!([next(), next(), next()], ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]);
    assert!(is_guarded(host.runtime_dir()), "it is ready when it shows that it lives");
    stop(guard);
    systemd.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
    let mut word = [0; 64];
    // What was sent before it stopped, and then nothing more.
    while systemd.recv(&mut word).is_ok() {}
    assert_eq!(state(guard), Some('T'));
}
